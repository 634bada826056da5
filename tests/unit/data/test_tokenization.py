"""From rows to class ids, and to tokens with labels for the loss."""

import copy

import pytest
from data_cases import CLASSES, COMPLETIONS, MESSAGES, TEXT, counted, language, numbered, prepared, section
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer

from sparse_zero.data import tokenization
from sparse_zero.data.datasets import prepare_data
from sparse_zero.data.tokenization import IGNORED
from sparse_zero.errors import UserError

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
def test_labels_become_class_ids(values, id2label, write_rows, tokenizer):
    rows = [{"text": f"sentence {row}", "label": values[row % len(values)]} for row in range(12)]
    data = section(write_rows(rows, "data.parquet"), eval_split="train")
    result = prepared(data, tokenizer, "sequence-classification")
    assert result.labels.id2label == id2label
    for split in (result.train, result.evaluation):
        assert [id2label[id] for id in split["labels"]] == [
            str(int(row["label"]) if isinstance(row["label"], float) else row["label"]) for row in rows
        ]
        assert set(split.column_names) == {"input_ids", "attention_mask", "labels"}
    assert result.train[3]["input_ids"] == tokenizer("sentence 3").input_ids


def test_classes_are_taken_from_both_splits(tokenizer):
    train = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "z"]})
    evaluation = Dataset.from_dict({"text": ["c", "d"], "label": ["z", "y"]})
    result = prepare_data(section("unused"), "sequence-classification", tokenizer, train, evaluation, 512)
    assert result.labels.id2label == {0: "x", 1: "y", 2: "z"}
    assert (result.train["labels"], result.evaluation["labels"]) == ([0, 2], [2, 1])


def test_a_class_label_feature_keeps_its_order(tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zero", "one", "absent"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    result = prepare_data(section("unused"), "sequence-classification", tokenizer, dataset, dataset, 512)
    assert result.labels.id2label == {0: "zero", 1: "one", 2: "absent"}
    assert result.train["labels"] == [1, 0, 1]


def test_pairs_are_cut_to_max_length_and_padded(tokenizer):
    dataset = Dataset.from_dict({"text": ["a b c d e f g h", "a"], "other": ["i j k l m n", "b"], "label": [0, 1]})
    data = section("unused", {**CLASSES, "text_pair": "other"}, max_length=6)
    result = prepare_data(data, "sequence-classification", tokenizer, dataset, dataset, 512)
    rows = [result.train[row] for row in range(2)]
    assert rows[0]["input_ids"] == tokenizer("a b c d e f g h", "i j k l m n", truncation=True, max_length=6).input_ids
    assert len(rows[0]["input_ids"]) == 6
    assert rows[1]["input_ids"] == tokenizer("a", "b").input_ids
    batch = result.collator(rows)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]


def test_rows_without_text_or_label_are_dropped_with_a_count(write_rows, tokenizer, caplog):
    path = write_rows("text,label\na,1\n,0\nb,\nc,0\nNA,1\nd,1\n", "gaps.csv")
    result = prepared(section(path, eval_split="train"), tokenizer, "sequence-classification")
    assert result.train["labels"] == [1, 0, 1, 1]
    assert "dropped 2 of 6 training examples: they have no value for text or label" in caplog.text


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["a", "b"], "label": [{"a": 1}, {"a": 2}]}, {}, "has the type dict; a label is"),
        ({"text": ["a", "b"], "label": [1, 1]}, {}, "has only the label 1;"),
        (
            {"text": [1, 2], "label": [0, 1]},
            {},
            "data.columns.text: the training data has the type int64 in column 'text'",
        ),
        ({"text": [None, "a"], "label": [0, None]}, {}, "no training example is left: all 2 have no value for"),
        ({"txt": ["a", "b"], "label": [0, 1]}, {}, r"data.columns.text: .* no column 'text'; did you mean 'txt'\?"),
        (
            {"text": ["a", "b"], "label": [0, 1]},
            {"max_length": 513},
            "data.max_length: 513 tokens, .* supports at most 512",
        ),
        ({"text": ["a", "b"], "label": [0, 1]}, {"max_length": 1}, "data.max_length: 1 leaves no room"),
    ],
)
def test_classification_errors(columns, settings, message, tokenizer):
    dataset = Dataset.from_dict(columns)
    with pytest.raises(UserError, match=message):
        prepare_data(section("unused", **settings), "sequence-classification", tokenizer, dataset, dataset, 512)


def test_unlabelled_and_mixed_labels_are_refused(tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    unlabelled = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features)
    integers = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    strings = Dataset.from_dict({"text": ["a", "b"], "label": ["0", "1"]})
    with pytest.raises(UserError, match="evaluation data has unlabelled examples"):
        prepare_data(section("unused"), "sequence-classification", tokenizer, integers, unlabelled, 512)
    with pytest.raises(UserError, match="labels of different types"):
        prepare_data(section("unused"), "sequence-classification", tokenizer, integers, strings, 512)


# Language models


def test_plain_text_counts_every_token_and_ends(tokenizer):
    result = language(tokenizer, TEXT, {"text": ["a good film", "bad"]})
    for row, text in zip(result.train, ["a good film", "bad"], strict=True):
        assert row["input_ids"] == row["labels"] == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert result.labels is None


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
            "changes earlier turns.*{% generation %}",
        ),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "fails on .*: roles must alternate"),
        ("{{ messages[0].content }}", [{"speaker": "x", "content": "y"}], "not a list of messages with role"),
    ],
)
def test_conversations_that_cannot_be_used(template, messages, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        language(tokenizer, MESSAGES, {"messages": [messages]})


def test_messages_column_of_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="has the type string in column 'messages', not lists of messages"):
        language(tokenizer, MESSAGES, {"messages": ["hello"]})


def test_examples_cut_before_their_completion_are_dropped_with_a_count(tokenizer, caplog):
    rows = {"prompt": ["a film that goes on and on and on", "a film"], "completion": [" good", " bad and worse"]}
    result = language(tokenizer, COMPLETIONS, rows, max_length=6)
    assert len(result.train) == 1
    whole = language(tokenizer, COMPLETIONS, rows).train[1]
    assert result.train[0] == {column: values[:6] for column, values in whole.items()}
    assert "dropped 1 of 2 training examples: they have no token to train on in their first 6 tokens" in caplog.text
    with pytest.raises(
        UserError, match="no training example is left: all 2 have no token to train on in their first 2"
    ):
        language(tokenizer, COMPLETIONS, rows, max_length=2)


def test_an_example_of_one_token_is_dropped(tokenizer):
    assert tokenization.encode_plain_text({"text": ["bad"]}, tokenizer, "text", 1)["dropped"] == [
        "have no token to train on in their first 1 tokens (data.max_length)"
    ]


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
    with pytest.raises(UserError, match="no eos token, which ends each example"):
        language(tokenizer, TEXT, {"text": ["a"]})
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        language(tokenizer, TEXT, {"text": ["a"]})


def test_tokens_are_computed_once_and_again_when_the_code_changes(write_rows, tokenizer_dir, tmp_path, monkeypatch):
    calls = []

    def spy(batch, **arguments):
        calls.append(len(batch["text"]))
        return encode(batch, **arguments)

    encode = tokenization.encode_plain_text
    spy.__module__, spy.__qualname__, spy.__name__ = encode.__module__, encode.__qualname__, encode.__name__
    monkeypatch.setattr(tokenization, "encode_plain_text", spy)
    data = section(write_rows(numbered(10)), TEXT)

    def run():
        calls.clear()
        prepared(data, AutoTokenizer.from_pretrained(tokenizer_dir))
        return sum(calls)

    assert run() == 10
    assert run() == 0
    monkeypatch.setattr("sparse_zero.data.cached_maps._version", lambda: "another version")
    assert run() == 10
