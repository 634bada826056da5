"""Maps and filters of data sets, kept in the cache of `datasets` until the code or the tokenizer libraries change."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from datasets import Dataset

import rpn.text


def map_batches(
    dataset: Dataset, function: Callable[..., dict[str, list]], batch_size: int = 1000, **arguments: Any
) -> Dataset:
    """Replace all columns by those that `function` returns for batches."""
    return dataset.map(
        versioned(function, arguments), batched=True, batch_size=batch_size, remove_columns=dataset.column_names
    )


def filter_rows(
    dataset: Dataset, function: Callable[..., list[bool]], columns: list[str], **arguments: Any
) -> Dataset:
    """The rows for which `function`, called with a list of values per column, returns True."""
    return dataset.filter(versioned(function, arguments), input_columns=columns, batched=True)


def versioned(function: Callable, arguments: dict[str, Any]) -> Callable:
    """`function` with its arguments, such that the cache of `datasets` is not used after the code has changed."""
    return partial(_apply, function, _version(), arguments)


def _apply(function: Callable, _: str, arguments: dict[str, Any], *batch: Any) -> Any:
    return function(*batch, **arguments)


@cache
def _version() -> str:
    """A hash of this package and the tokenizer libraries. `datasets` identifies imported functions only by name."""
    files = (*sorted(Path(__file__).parent.glob("*.py")), Path(rpn.text.__file__))
    sources = b"".join(file.read_bytes() for file in files)
    releases = f"{transformers.__version__} {tokenizers.__version__}".encode()
    return hashlib.sha256(sources + releases).hexdigest()
