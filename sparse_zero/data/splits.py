"""The raw examples of a recipe: read, filtered and split.

    train, evaluation = load_splits(recipe.data)

Nothing here depends on the rank: all ranks read the same examples in the same order.
"""

import re
import reprlib

from datasets import ClassLabel, Dataset, DatasetBuilder, Value

from sparse_zero.data.cached_maps import filter_rows
from sparse_zero.data.columns import require_column, type_name
from sparse_zero.data.files import message_of, open_builder
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.recipe import DataSection


def load_splits(data: DataSection) -> tuple[Dataset, Dataset]:
    """The training and the evaluation examples of `load_parts`."""
    train, evaluation, _ = load_parts(data)
    return train, evaluation


def load_parts(data: DataSection) -> tuple[Dataset, Dataset, Dataset | None]:
    """Load the raw examples, filtered and limited to the sizes that the recipe sets.

    Without `data.eval_split`, evaluation examples are held out from the training split and not used for training.
    Without `data.test_split`, test examples are taken out of the evaluation examples. A split may be a slice
    ("train[:80%]"). Subsets are drawn at random with `data.split_seed`.

    Returns: the training, evaluation and test examples; no test examples if the recipe asks for none.

    Raises:
        UserError: a missing file, an unknown split or filter column, a split that is empty or too small, or data that
            `datasets` cannot read.
    """
    builder = open_builder(data)
    train = _read(builder, data, "train_split")
    if data.eval_split is None:
        train, evaluation = _hold_out(train, data)
    else:
        train, evaluation = _subset(train, data, "train"), _subset(_read(builder, data, "eval_split"), data, "eval")
    if data.test_split is not None:
        return train, evaluation, _subset(_read(builder, data, "test_split"), data, "test")
    if data.test_size is None:
        return train, evaluation, None
    count = _count(data.test_size, len(evaluation), "test")
    if count == len(evaluation):
        raise UserError(
            f"data.test_size: {data.test_size} takes all {count} evaluation examples: reduce it, raise "
            "data.eval_size, or set data.test_split"
        )
    parts = evaluation.train_test_split(test_size=count, seed=data.split_seed)
    return train, parts["train"], parts["test"]


def _read(builder: DatasetBuilder, data: DataSection, key: str) -> Dataset:
    split = getattr(data, key)
    known = list(builder.info.splits)
    if re.split(r"[\[+]", split)[0] not in known:
        near = did_you_mean(split, known)
        raise UserError(f"data.{key}: '{data.path}' has no split '{split}'{near}; its splits: {', '.join(known)}")
    try:
        dataset = builder.as_dataset(split)
    except ValueError as error:
        raise UserError(f"data.{key}: split '{split}' of '{data.path}': {message_of(error)}") from error
    if not data.filter:
        return dataset
    for column in data.filter:
        require_column(dataset, column, f"data.filter: split '{split}'")
        if not isinstance(dataset.features[column], Value | ClassLabel):
            raise UserError(
                f"data.filter: column '{column}' has the type {type_name(dataset.features[column])}; filters need "
                "single values"
            )
    wanted = [value if isinstance(value, list) else [value] for value in data.filter.values()]
    kept = filter_rows(dataset, _matches, list(data.filter), wanted=wanted)
    if len(kept) == 0:
        seen = "; ".join(f"{column} has {reprlib.repr(dataset.unique(column))}" for column in data.filter)
        raise UserError(f"data.filter: {data.filter} matches none of the {len(dataset)} examples of '{split}'; {seen}")
    return kept


def _matches(*columns: list, wanted: list[list]) -> list[bool]:
    tests = [[value in values for value in column] for column, values in zip(columns, wanted, strict=True)]
    return [all(row) for row in zip(*tests, strict=True)]


def _hold_out(dataset: Dataset, data: DataSection) -> tuple[Dataset, Dataset]:
    total = len(dataset)
    held_out = _count(data.eval_size, total, "eval") if data.eval_size is not None else max(total // 10, 1)
    rest = _count(data.train_size, total, "train") if data.train_size is not None else total - held_out
    if rest < 1 or rest + held_out > total:
        raise UserError(
            f"data.train_split '{data.train_split}': {max(rest, 1)} training and {held_out} held-out evaluation "
            f"examples are more than its {total}; reduce data.train_size or data.eval_size, or set data.eval_split"
        )
    splits = dataset.train_test_split(test_size=held_out, train_size=rest, seed=data.split_seed)
    return splits["train"], splits["test"]


def _subset(dataset: Dataset, data: DataSection, role: str) -> Dataset:
    size = getattr(data, f"{role}_size")
    if size is None:
        return dataset
    return dataset.shuffle(seed=data.split_seed).select(range(_count(size, len(dataset), role)))


def _count(size: int | float, available: int, role: str) -> int:
    count = int(size * available) if isinstance(size, float) and size <= 1 else int(size)
    if size > 1 and count != size:
        raise UserError(f"data.{role}_size: {size} is neither a number of examples nor a fraction of at most 1")
    if not 1 <= count <= available:
        raise UserError(
            f"data.{role}_size: {size} means {count} examples; the split has {available} (after data.filter)"
        )
    return count
