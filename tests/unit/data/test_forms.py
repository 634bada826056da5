"""The form of a data set is recognised by its columns, and a right recipe is proposed for it."""

import json
import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from families import tiny

from launcher import cli
from sparse_zero.data.forms import recognise
from sparse_zero.errors import UserError
from sparse_zero.recipe.learning_rate import default_learning_rate
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.train import main

WORDS = ["a good film", "bad", "it is what it is", "one of the worst"] * 10


def turns(user="user", assistant="assistant", role="role", content="content"):
    return [{role: user, content: "hello"}, {role: assistant, content: "fine"}]


FORMS = {
    "chat": ({"messages": [turns()] * 40}, {"messages": "messages"}),
    "sharegpt": (
        {"conversations": [turns("human", "gpt", "from", "value")] * 40, "tools": ["[]"] * 40},
        {"messages": "conversations", "tools": "tools"},
    ),
    "alpaca": (
        {"instruction": WORDS, "input": ["", "x"] * 20, "output": WORDS},
        {"prompt": ["instruction", "input"], "completion": "output"},
    ),
    "prompts": (
        {"Prompt": WORDS, "Completion": WORDS, "id": range(40)},
        {"prompt": "Prompt", "completion": "Completion"},
    ),
    "gsm8k": ({"question": WORDS, "answer": WORDS}, {"prompt": "question", "completion": "answer"}),
    "classes": ({"text": WORDS, "label": ["pos", "neg"] * 20}, {"text": "text", "label": "label"}),
    "stars": ({"review": WORDS, "stars": [1, 2, 3, 4] * 10}, {"text": "review", "label": "stars"}),
    "numbers": (
        {"sentence1": WORDS, "sentence2": WORDS, "score": [0.5, 1.0, 2.5, 4.0] * 10},
        {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
    ),
    "several": ({"text": WORDS, "labels": [["a"], [], ["b", "a"], ["c"]] * 10}, {"text": "text", "label": "labels"}),
    "preferences": (
        {"prompt": WORDS, "chosen": WORDS, "rejected": WORDS},
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    "preferred chats": (
        {"chosen": [turns()] * 40, "rejected": [turns("user", "assistant")] * 40, "score": [0.5] * 40},
        {"chosen": "chosen", "rejected": "rejected"},
    ),
    "preferred texts": ({"chosen": WORDS, "Rejected": WORDS}, {"chosen": "chosen", "rejected": "Rejected"}),
    "preferred chats with a text": (
        {"prompt": WORDS, "chosen": [turns()] * 40, "rejected": [turns()] * 40},
        {"chosen": "chosen", "rejected": "rejected"},
    ),
    "preferred answers in a chat": (
        {"prompt": [turns()[:1]] * 40, "chosen": [turns()[1:]] * 40, "rejected": [turns()[1:]] * 40},
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    "plain": ({"text": WORDS, "url": WORDS}, {"text": "text"}),
    "one column": ({"lyrics": WORDS, "year": [2000] * 40}, {"text": "lyrics"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_recognised_by_its_columns(name):
    rows, columns = FORMS[name]
    form = recognise(Dataset.from_dict({key: list(values) for key, values in rows.items()}))
    assert form.columns == columns
    assert form.task == ("sequence-classification" if "label" in columns else "causal-lm")
    assert bool(form.notes) == ("chosen" in rows)
    assert form.objective == ("dpo" if "chosen" in rows else None)
    if "chosen" in rows:
        reward = recognise(Dataset.from_dict({key: list(values) for key, values in rows.items()}), "reward")
        assert (reward.columns, reward.task, reward.notes) == (columns, "sequence-classification", ())


def test_class_label_features_are_labels_whatever_their_number():
    names = [str(number) for number in range(300)]
    for label in (ClassLabel(names=names), List(ClassLabel(names=names))):
        features = Features({"sentence": Value("string"), "intent": label})
        values = [1] * 40 if isinstance(label, ClassLabel) else [[1, 2]] * 40
        form = recognise(Dataset.from_dict({"sentence": WORDS, "intent": values}, features=features))
        assert form.columns == {"text": "sentence", "label": "intent"}


def test_free_text_is_not_a_label():
    rows = {"text": WORDS, "category": [f"a remark of its own, number {row}" for row in range(40)]}
    assert recognise(Dataset.from_dict(rows)).columns == {"text": "text"}


def test_other_columns_are_named():
    with pytest.raises(UserError, match="the columns x, y have no form that is known; write a recipe"):
        recognise(Dataset.from_dict({"x": [1, 2], "y": [3, 4]}))


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return tmp_path


@pytest.mark.parametrize("name", [name for name in FORMS if name != "one column"])
def test_init_writes_a_recipe_that_check_and_data_accept(name, folder, capsys):
    rows, columns = FORMS[name]
    lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    (folder / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["init", "d.jsonl", "--model", "model"]) == 0
    following = "check" if "chosen" in rows else "data"
    assert f"next: sparse-zero {following} d.yaml" in capsys.readouterr().out
    recipe = load_recipe("d.yaml")
    assert recipe.data.columns.model_dump(exclude_none=True) == columns
    assert recipe.data.max_length % 64 == 0
    assert recipe.training["per_device_train_batch_size"] * recipe.training["gradient_accumulation_steps"] <= 2
    rate = 5e-4 if "chosen" in columns else 3e-3 if "label" in columns else 1e-2
    assert recipe.training["learning_rate"] == rate
    assert recipe.training.get("objective") == ("dpo" if "chosen" in columns else None)
    assert cli.main(["check", "d.yaml"]) == 0
    capsys.readouterr()
    if "chosen" in columns:
        return
    assert cli.main(["data", "d.yaml", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["train"]["given"], facts["train"]["used"], facts["evaluation"]["used"]) == (36, 36, 4)
    assert cli.main(["init", "d.jsonl", "--model", "model"]) == 2
    assert "d.yaml: already exists" in capsys.readouterr().err


def test_init_for_a_reward_model(folder, capsys):
    """Its length is that of one answer with the prompt; a run of two steps ends with an adapter."""
    rows = [{"prompt": "hello", "chosen": " fine" * 40, "rejected": " bad" * 40} for _ in range(20)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["init", "d.jsonl", "--model", "model", "--objective", "reward", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["training"]["objective"], recipe["training"]["learning_rate"]) == ("reward", 3e-3)
    assert load_recipe("d.yaml").model.task == "sequence-classification"
    assert recipe["data"]["max_length"] == 64
    assert cli.main(["check", "d.yaml"]) == 0
    quick = ["use_cpu=true", "max_steps=2", "report_to=none", "save_strategy=no", "eval_strategy=no"]
    assert main(["d.yaml", *(f"training.{setting}" for setting in quick)]) == 0
    assert list(folder.glob("runs/*/adapter/adapter_model.safetensors"))
    (folder / "e.jsonl").write_text('{"text": "a"}\n' * 20)
    assert cli.main(["init", "e.jsonl", "--model", "model", "--objective", "dpo"]) == 2
    assert "the columns text are no preferences: dpo needs `chosen` and `rejected`" in capsys.readouterr().err


def test_init_without_a_model_that_can_be_loaded_says_so(folder, capsys):
    (folder / "d.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    assert cli.main(["init", "d.csv"]) == 0
    assert "cannot be loaded here" in capsys.readouterr().out
    assert load_recipe("d.yaml").model.task == "sequence-classification"
    assert cli.main(["init", "d.csv", "--model", "none/such", "--out", "e.yaml"]) == 2
    assert "model.name: none/such cannot be loaded" in capsys.readouterr().err
    assert not Path("e.yaml").exists()


RECIPE = """
model: {name: model, task: causal-lm}
data: {path: d.jsonl, columns: {messages: messages}, eval_split: train, max_length: 24}
"""


def test_data_shows_what_counts_and_what_is_dropped(folder, capsys, tokenizer):
    rows = [turns()] * 6 + [turns(assistant="critic")] + [[{"role": "user", "content": "hello " * 40}, turns()[1]]]
    (folder / "d.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (folder / "r.yaml").write_text(RECIPE)
    assert cli.main(["data", "r.yaml", "--json", "--examples", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    train = facts["train"]
    assert (train["given"], train["used"], train["cut"]) == (8, 6, 1)
    assert train["dropped"] == {
        "have no turn of the assistant, only of user, critic": 1,
        "have no token to train on in their first 24 tokens (data.max_length)": 1,
    }
    whole = len(tokenizer.apply_chat_template(rows[-1], return_dict=True)["input_ids"])
    assert (train["tokens"]["maximum"], train["lost_tokens"]) == (whole, whole - 24)
    assert sum(count for *_, count in train["histogram"]) == 7
    parts = facts["examples"][0]["parts"]
    assert [text for text, is_counted in parts if is_counted] == ["fine<|im_end|>"]
    assert "".join(text for text, _ in parts) == tokenizer.apply_chat_template(rows[0], tokenize=False)
    assert train["counted_tokens"] == 6 * len(tokenizer("fine<|im_end|>", add_special_tokens=False).input_ids)
    assert cli.main(["data", "r.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "[fine<|im_end|>]" in printed
    assert "6 of 8 are used" in printed


def test_packed_data_and_labels_are_described(folder, capsys):
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text, "label": "x"}) + "\n" for text in WORDS))
    (folder / "r.yaml").write_text(
        RECIPE.replace("messages: messages", "text: text").replace("24", "64, packing: true")
    )
    assert cli.main(["data", "r.yaml", "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["train"]
    assert train["used"] == 40
    assert train["sequences"] < 10
    assert cli.main(["data", "r.yaml", "--examples", "-1"]) == 2


def test_changed_copies_of_the_examples_are_shown(folder, capsys):
    rows = [{"text": text, "label": "xy"[number % 2]} for number, text in enumerate(WORDS)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(
        RECIPE.replace("causal-lm", "sequence-classification")
        .replace("messages: messages", "text: text, label: label")
        .replace("24", "24, augment: aeda, augment_copies: 2")
    )
    assert cli.main(["data", "r.yaml"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"train, with copies +120\b", printed)
    assert "evaluation, with copies" not in printed


def test_several_columns_of_a_prompt_are_joined(tokenizer):
    from data_cases import language

    columns = {"prompt": ["instruction", "input"], "completion": "output"}
    rows = {"instruction": ["do", "do"], "input": ["it", None], "output": [" yes", " no"]}
    result = language(tokenizer, columns, rows).train
    assert tokenizer.decode(result[0]["input_ids"], skip_special_tokens=True) == "do\n\nit yes"
    assert tokenizer.decode(result[1]["input_ids"], skip_special_tokens=True) == "do no"


def test_the_default_learning_rate_falls_with_the_share():
    assert [default_learning_rate("causal-lm", share) for share in (0.001, 0.01, 1)] == [1e-2, 1e-2, 3e-4]
    assert default_learning_rate("causal-lm", None) == 1e-2
    assert default_learning_rate("sequence-classification", 0.01) == 3e-3
    shares = (0.02, 0.05, 0.1, 0.3, 1)
    rates = [default_learning_rate("sequence-classification", share) for share in shares]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 1e-4
