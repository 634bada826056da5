"""`sparse-zero generate`: the evaluation prompts of a recipe, answered into a file."""

import json
from pathlib import Path

import pytest
from cli_cases import one_error

from launcher.cli import main
from sparse_zero.generation.language_model import open_model

ROWS = [
    {"q": f"is film {number} good ?", "hint": "say why" if number % 2 else None, "a": f"film {number} is good"}
    for number in range(5)
]


@pytest.fixture
def recipe(base, write_rows, tmp_path):
    """Writes a recipe; its evaluation examples are the training examples."""

    def write(columns: str, rows=ROWS, task: str = "causal-lm") -> str:
        data = write_rows(rows)
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{name: {base}, task: {task}}}\n"
            f"data: {{path: {data}, columns: {columns}, eval_split: train}}\n"
            "training: {per_device_eval_batch_size: 2}\n"
        )
        return str(path)

    return write


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_answered_as_in_training(recipe, base, adapter, tmp_path, capsys):
    path, out = recipe("{prompt: [q, hint], completion: a}"), tmp_path / "answers.jsonl"
    words = ["generate", path, "--adapter", str(adapter), "--out", str(out), "--compare", "--max-new-tokens", "5"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "model": str(adapter), "answers": 5}
    found = lines(out)
    prompts = [row["q"] + (f"\n\n{row['hint']}" if row["hint"] else "") for row in ROWS]
    assert [row["prompt"] for row in found] == prompts
    assert [row["reference"] for row in found] == [row["a"] for row in ROWS]
    for key, model in (("answer", open_model(str(adapter))), ("base_answer", open_model(str(base)))):
        # <bos> and the text, without an end
        alone = [
            model.answer([[1, *model.tokenizer(text, add_special_tokens=False).input_ids]], 5) for text in prompts
        ]
        assert [row[key] for row in found] == [answer for [answer] in alone]


def test_conversations_are_answered_before_the_last_answer(recipe, base, tmp_path, capsys):
    turns = [
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "a film ?"},
        {"from": "gpt", "value": "yes"},
    ]
    rows = [{"talk": turns}, {"talk": turns[:1]}, {"talk": turns[:2]}]
    out = tmp_path / "answers.jsonl"
    words = ["generate", recipe("{messages: talk}", rows), "--out", str(out), "--max-new-tokens", "4", "--show", "1"]
    assert main(words) == 0
    assert "a film ?" in capsys.readouterr().out
    found = lines(out)
    assert [row["reference"] for row in found] == ["yes", "hi"]  # the second has no answer
    assert [turn["role"] for turn in found[0]["prompt"]] == ["user", "assistant", "user"]
    model = open_model(str(base))
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    assert found[1] == {
        "prompt": [{"role": "user", "content": "hello"}],
        "reference": "hi",
        "answer": model.answer([ids], 4)[0],
    }


def test_a_number_of_examples(recipe, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    words = ["generate", recipe("{prompt: q, completion: a}"), "--out", str(out), "--max-new-tokens", "2"]
    assert main([*words, "--examples", "3"]) == 0
    assert [row["prompt"] for row in lines(out)] == [row["q"] for row in ROWS[:3]]


def test_bad_input_is_one_sentence(recipe, base, adapter, tmp_path, capsys):
    good, out = recipe("{prompt: q, completion: a}"), str(tmp_path / "answers.jsonl")
    (tmp_path / "there").touch()

    def error(path: str, *words: str) -> str:
        assert main(["generate", path, *(words if "--out" in words else [*words, "--out", out])]) == 2
        assert not Path(out).exists()
        return one_error(capsys)

    assert "already exists; name another file with --out" in error(good, "--out", str(tmp_path / "there"))
    assert "cannot be written (No such file or directory)" in error(good, "--out", str(tmp_path / "no" / "file"))
    assert "--examples 0: must be at least 1" in error(good, "--examples", "0")
    assert "there is no base model to compare" in error(good, "--compare")
    assert "has no column 'none'" in error(good, "data.columns.prompt=none")
    assert "plain text has no prompts" in error(recipe("{text: a}"))
    classifier = recipe("{text: q, label: a}", task="sequence-classification")
    assert "use `sparse-zero evaluate`" in error(classifier)
