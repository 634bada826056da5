"""The columns that a recipe names: whether the data has them, with values of the right type."""

from typing import Any

from datasets import ClassLabel, Dataset, Value

from sparse_zero.data.dropped import Dropped
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.recipe import Columns


def check_columns(dataset: Dataset, columns: Columns, name: str) -> None:
    """Raise UserError if a split has no column of this name, or one of another type. Args: name: of the split."""
    named = [
        (role, column)
        for role, given in columns.model_dump(exclude_none=True).items()
        for column in ([given] if isinstance(given, str) else given)
    ]
    for role, column in named:
        where = f"data.columns.{role}: the {name} data"
        require_column(dataset, column, where)
        feature = dataset.features[column]
        dtype = getattr(feature, "dtype", None)
        if role in ("text", "text_pair", "prompt", "completion") and dtype not in ("string", "large_string"):
            raise UserError(f"{where} has the type {type_name(feature)} in column '{column}', not text")
        if role in ("chosen", "rejected") and isinstance(feature, Value) and dtype not in ("string", "large_string"):
            raise UserError(
                f"{where} has the type {type_name(feature)} in column '{column}', neither text nor lists of messages"
            )
        if role == "messages" and isinstance(feature, Value | ClassLabel):
            raise UserError(f"{where} has the type {type_name(feature)} in column '{column}', not lists of messages")


def require_column(dataset: Dataset, column: str, where: str) -> None:
    """Raise UserError if there is no such column. Args: where: what asked for it, for the message."""
    if column not in dataset.column_names:
        near = did_you_mean(column, dataset.column_names)
        raise UserError(f"{where} has no column '{column}'{near}; its columns: {', '.join(dataset.column_names)}")


def type_name(feature: Any) -> str:
    """What messages call the type of a column."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def required_columns(columns: Columns) -> list[str]:
    """The columns that must have a value. A conversation may have no tools, and an instruction no input."""
    used = columns.model_dump(exclude_none=True, exclude={"tools"})
    return [column if isinstance(column, str) else column[0] for column in used.values()]


def without_incomplete(dataset: Dataset, columns: Columns, name: str) -> Dataset:
    """Leave out the examples that lack a value. Raises UserError: none is left. Args: name: of the split."""
    return Dropped().incomplete(dataset, required_columns(columns), name)
