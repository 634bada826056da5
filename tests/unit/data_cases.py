"""Data sections and rows for the tests of data."""

from pathlib import Path

from datasets import Dataset

from sparse_zero.data.datasets import prepare_data
from sparse_zero.data.splits import load_splits
from sparse_zero.data.tokenization import IGNORED
from sparse_zero.recipe.recipe import DataSection

TEXT = {"text": "text"}
CLASSES = {"text": "text", "label": "label"}
COMPLETIONS = {"prompt": "prompt", "completion": "completion"}
MESSAGES = {"messages": "messages"}


def section(path: str | Path, columns: dict = CLASSES, **settings) -> DataSection:
    return DataSection(path=str(path), columns=columns, **settings)


def numbered(count: int) -> list[dict]:
    return [{"text": f"sentence {row}", "label": row % 2} for row in range(count)]


def prepared(data: DataSection, tokenizer, task: str = "causal-lm", model_limit: int | None = 512):
    return prepare_data(data, task, tokenizer, *load_splits(data), model_limit)


def counted(row: dict, tokenizer) -> str:
    """The text of the tokens with a loss."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def language(tokenizer, columns: dict, rows: dict, model_limit: int | None = 512, **settings):
    dataset = Dataset.from_dict(rows)
    return prepare_data(section("unused", columns, **settings), "causal-lm", tokenizer, dataset, dataset, model_limit)
