"""`data.augment`: changed copies of the training examples, in the data and in a real run."""

from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

import rpn.text
from sparse_zero.data.datasets import prepare_data
from sparse_zero.data.splits import load_splits
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import Recipe

ROWS = [{"text": f"it is number {n} of all the films", "label": n % 2, "other": n} for n in range(12)]
COLUMNS = {"text": "text", "label": "label"}


def recipe(path: Path, model: object = "model", **data: object) -> Recipe:
    section = {"path": str(path), "columns": COLUMNS, "eval_size": 2, "augment": "aeda"} | data
    return Recipe.model_validate({"model": {"name": str(model), "task": "sequence-classification"}, "data": section})


def texts(read: Recipe, tokenizer) -> tuple[list[str], list[str]]:
    prepared = prepare_data(read.data, "sequence-classification", tokenizer, *load_splits(read.data), 64)
    return tuple(
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in split["input_ids"]]
        for split in (prepared.train, prepared.evaluation)
    )


def test_each_training_example_is_followed_by_its_copies(write_rows, tokenizer):
    path = write_rows(ROWS)
    plain, held_out = texts(recipe(path, augment=None), tokenizer)
    train, evaluation = texts(recipe(path, augment_copies=2), tokenizer)
    assert evaluation == held_out
    assert train[::3] == plain
    raw = load_splits(recipe(path).data)[0]["text"]
    for index, given in enumerate(raw):
        for copy in (1, 2):
            own = rpn.text.augment(given, "aeda", Random(f"0 {index} {copy}"))
            ids = tokenizer(own, truncation=True, max_length=64).input_ids
            assert train[3 * index + copy] == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(train)) == 30
    assert texts(recipe(path, augment_copies=2), tokenizer)[0] == train
    other = recipe(path, augment_copies=2, split_seed=1, eval_split="train")
    assert texts(other, tokenizer)[0][1] != train[1]


def test_labels_go_with_the_copies(write_rows, tokenizer):
    read = recipe(write_rows(ROWS))
    train = prepare_data(read.data, "sequence-classification", tokenizer, *load_splits(read.data), 64).train
    assert train["labels"][::2] == train["labels"][1::2]
    assert len({*train["labels"]}) == 2


def test_eda_without_wordnet_is_refused(write_rows, tokenizer, monkeypatch):
    def missing(word: str) -> list[str]:
        raise rpn.text.SynonymsNotFound("eda takes its synonyms from WordNet")

    monkeypatch.setattr(rpn.text, "wordnet_synonyms", missing)
    with pytest.raises(UserError, match=r"data\.augment: eda takes its synonyms from WordNet"):
        texts(recipe(write_rows(ROWS), augment="eda"), tokenizer)


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("sequence-classification", COLUMNS | {"text_pair": "other"}),
        ("causal-lm", {"text": "text"}),
    ],
)
def test_other_data_are_refused(task, columns):
    data = {"path": "data.csv", "columns": columns, "augment": "aeda"}
    with pytest.raises(ValidationError, match=r"data\.augment: aeda is for sequence classification of single texts"):
        Recipe.model_validate({"model": {"name": "m", "task": task}, "data": data})
