"""The labels of a sequence classifier: classes, several classes for each text, or numbers.

    labels = read_labels("label", {"training": train, "evaluation": evaluation}, head={0: "NEGATIVE", 1: "POSITIVE"})
    labels.targets("training", ["positive", "negative"])  # [1, 0]

The kinds are transformers' `problem_type`s. They have the losses of transformers: cross entropy for one class, binary
cross entropy for each of several, and the mean squared error for numbers.
"""

import logging
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List

from sparse_zero.data.columns import type_name
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import ProblemType

logger = logging.getLogger(__name__)

_SINGLE_TYPES = ("bool", "int", "uint", "float", "string", "large_string")

Label = str | int | bool


@dataclass(frozen=True)
class Labels:
    """How the values of a label column become what the loss takes."""

    problem_type: ProblemType
    id2label: dict[int, str]
    """The classes; {0: "LABEL_0"} for numbers."""
    ids: Mapping[str, Mapping[Any, int]]
    """For each split: the class id of each value of the column. Empty for numbers."""
    starts_anew: bool = False
    """Whether the checkpoint's head belongs to other classes, so that its weights must not be used."""

    def targets(self, split: str, values: list) -> list:
        """Returns: for each value a class id, a list of 0.0 and 1.0 for each class, or a number."""
        if self.problem_type == "regression":
            return [float(value) for value in values]
        ids = self.ids[split]
        if self.problem_type == "single_label_classification":
            return [ids[value] for value in values]
        chosen = [{ids[label] for label in labels} for labels in values]
        return [[float(index in indices) for index in self.id2label] for indices in chosen]


def read_labels(
    column: str,
    splits: Mapping[str, Dataset],
    problem_type: ProblemType | None = None,
    head: Mapping[int, str] | None = None,
) -> Labels:
    """Find out what kind of labels a column has, and assign class ids to the labels that occur in either split.

    Args:
        column: the column of the labels, without missing values.
        splits: the raw examples, by name ("training", ...).
        problem_type: the kind of labels; None: lists are several classes, numbers with fractions are regression, and
            everything else is one class.
        head: the classes of the checkpoint's own head; None if it has no head. Labels are matched to them by name.

    Raises:
        UserError: labels of a type that cannot be a class, of different kinds, or that `problem_type` does not fit.
    """
    kinds = {name: _kind(split, column, name) for name, split in splits.items()}
    found = set(kinds.values())
    if "multi_label_classification" in found and len(found) > 1:
        raise UserError(f"data.columns.label: column '{column}' has lists in one split and single labels in the other")
    kind: ProblemType = "regression" if "regression" in found else found.pop()
    if problem_type is not None:
        _check_kind(kind, problem_type, column)
        kind = problem_type
    if kind == "regression":
        return _numbers(column, splits)
    return _classes(column, splits, kind, head)


def _kind(split: Dataset, column: str, name: str) -> ProblemType:
    feature = split.features[column]
    if isinstance(feature, List | LargeList):
        return "multi_label_classification"
    dtype = type_name(feature)
    where = f"data.columns.label: column '{column}' of the {name} data"
    if not isinstance(feature, ClassLabel) and not dtype.startswith(_SINGLE_TYPES):
        raise UserError(
            f"{where} has the type {dtype}; a label is a string, an integer, a boolean, a number, or a list of "
            "strings or integers"
        )
    # pandas turns an integer column with missing values into floats
    if dtype.startswith("float") and any(not value.is_integer() for value in split.unique(column)):
        return "regression"
    return "single_label_classification"


def _check_kind(found: ProblemType, wanted: ProblemType, column: str) -> None:
    if found == wanted or (found, wanted) == ("single_label_classification", "regression"):
        return
    seen = {
        "regression": "numbers with fractions",
        "single_label_classification": "single labels",
        "multi_label_classification": "lists",
    }[found]
    raise UserError(f"model.problem_type: {wanted} does not fit column '{column}', which has {seen}")


def _numbers(column: str, splits: Mapping[str, Dataset]) -> Labels:
    for name, split in splits.items():
        feature = split.features[column]
        dtype = type_name(feature)
        if isinstance(feature, ClassLabel) or not dtype.startswith(("int", "uint", "float")):
            raise UserError(
                f"data.columns.label: column '{column}' of the {name} data has the type {dtype}; regression needs "
                "numbers"
            )
        values = split.unique(column)
        if bad := [value for value in values if value - value != 0]:
            raise UserError(f"data.columns.label: column '{column}' of the {name} data has {bad[0]}, not a number")
    return Labels("regression", {0: "LABEL_0"}, {})


def _classes(column: str, splits: Mapping[str, Dataset], kind: ProblemType, head: Mapping[int, str] | None) -> Labels:
    of_value = {name: _labels_by_value(split, column, name) for name, split in splits.items()}
    known = list(dict.fromkeys(label for by_value in of_value.values() for label in by_value.values()))
    where = f"data.columns.label: column '{column}'"
    if len({type(label) for label in known}) > 1:
        raise UserError(f"{where} has labels of different types in the two splits: {reprlib.repr(known)}")
    if head and (matched := _match(known, head)):
        order, starts_anew = dict(head), False
        ids = matched
    else:
        if kind == "single_label_classification" and len(known) < 2:
            raise UserError(f"{where} has only the label {known[0]}; a classifier needs at least two classes")
        if not known:
            raise UserError(f"{where} has no label at all: all lists are empty")
        if not isinstance(_inner(splits["training"].features[column]), ClassLabel):
            known.sort()
        ids = {label: id for id, label in enumerate(known)}
        order = {id: str(label) for label, id in ids.items()}
        starts_anew = _report_other_head(order, head)
    by_split = {name: {value: ids[label] for value, label in by_value.items()} for name, by_value in of_value.items()}
    return Labels(kind, order, by_split, starts_anew)


def _match(labels: list[Label], head: Mapping[int, str]) -> dict[Label, int] | None:
    """The class id of each label in a checkpoint's head, by name, as LABEL_0, LABEL_1, ... or as integers; None if a
    label has none.
    """
    names = {str(name).strip().casefold(): index for index, name in head.items()}
    by_name = {label: names.get(str(label).strip().casefold()) for label in labels}
    if len(names) == len(head) and None not in by_name.values():
        return by_name
    numbers = {label: _number(label) for label in labels}
    # Integers that are only some of the ids may be other classes, such as one to five stars
    is_right = set(numbers.values()) == set(head) or all(isinstance(label, str) for label in labels)
    return numbers if is_right and all(number in head for number in numbers.values()) else None


def _number(label: Label) -> int | None:
    """1 for the labels 1 and "LABEL_1"."""
    if isinstance(label, str):
        found = re.fullmatch(r"label_(\d+)", label.strip().casefold())
        return int(found[1]) if found else None
    return None if isinstance(label, bool) else label


def _report_other_head(order: dict[int, str], head: Mapping[int, str] | None) -> bool:
    """Say what becomes of the checkpoint's own head. Returns: whether it must start anew."""
    if not head:
        return False
    shown = reprlib.repr(list(order.values()))
    if len(head) == len(order) and all(_number(str(name)) == index for index, name in head.items()):
        logger.warning(
            "the classes of the checkpoint's head have no names (LABEL_0, ...): they are taken for %s, in this order",
            shown,
        )
        return False
    logger.warning(
        "the checkpoint's head has the classes %s, the data has %s: the head starts anew",
        reprlib.repr(list(head.values())),
        shown,
    )
    return len(head) == len(order)  # a head of another size is replaced in any case


def _labels_by_value(dataset: Dataset, column: str, name: str) -> dict[Any, Label]:
    """The label for each value of the column, or for each value in its lists."""
    feature = _inner(dataset.features[column])
    where = f"data.columns.label: column '{column}' of the {name} data"
    values = _values(dataset, column, where)
    if isinstance(feature, ClassLabel):
        if values and min(values) < 0:
            raise UserError(
                f"{where} has unlabelled examples ({min(values)}); choose another split or set data.filter"
            )
        return dict(enumerate(feature.names))
    if type_name(feature).startswith("float"):
        return {value: int(value) for value in values}
    return {value: value for value in values}


def _values(dataset: Dataset, column: str, where: str) -> list:
    """The distinct values of a column of single labels or of lists."""
    feature = dataset.features[column]
    if not isinstance(feature, List | LargeList):
        return dataset.unique(column)
    dtype = type_name(feature.feature)
    if not isinstance(feature.feature, ClassLabel) and not dtype.startswith(("int", "uint", "string", "large_str")):
        raise UserError(f"{where} has lists of {dtype}; several labels are a list of strings or integers")
    distinct: dict[Any, None] = {}
    for batch in dataset.select_columns([column]).iter(10_000):
        for labels in batch[column]:
            if None in labels:
                raise UserError(f"{where} has a missing value within the list {reprlib.repr(labels)}")
            if len(set(labels)) < len(labels):
                raise UserError(
                    f"{where} has {reprlib.repr(labels)}, which names a label twice; give each text the list of its "
                    "labels, not an indicator for each class"
                )
            distinct.update(dict.fromkeys(labels))
    return list(distinct)


def _inner(feature: Any) -> Any:
    return feature.feature if isinstance(feature, List | LargeList) else feature
