"""Which weights have drawn columns, which of them share the columns, and how many there are."""

import logging
import math
from collections.abc import Collection, Mapping
from fractions import Fraction

from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.quantized.formats import weight_shape
from sparse_zero.selection.columns import Columns
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.targets import Target, is_experts
from sparse_zero.zero.parameters import full_shape

logger = logging.getLogger(__name__)

LAYER_WRAPPERS = {"_orig_mod", "base_layer", "_checkpoint_wrapped_module"}
"""Attributes that contain a layer in a wrapper of this single layer."""

ALIGNED = 8
"""From ALIGNED * ALIGNED columns on, a share is a multiple of this: tensor cores read 16 bytes of a row at a time."""

NOTABLE = 1.1
"""How many times its budget `columns: whole` may select before it is said."""


def choose_columns(
    config: SparseConfig, targets: Mapping[str, Target], counts: Mapping[str, int], with_rows: Collection[str]
) -> tuple[dict[str, Columns], dict[str, int]]:
    """The columns that scalars are drawn from, and with `columns: whole` the number of scalars that these have.

    Args:
        config: `columns` is used.
        targets: by parameter name.
        counts: number of scalars of each target, from the budget.
        with_rows: names of targets of which some rows are trained in full. They get no columns.

    Returns:
        The columns of each weight that an input meets in a product, and the counts of all targets.

    Raises:
        UserError: the share of the columns has fewer scalars than the budget needs.
    """
    if config.columns == 1:
        return {}, dict(counts)
    axes = {name: None if name in with_rows else input_axis(target) for name, target in targets.items()}
    if others := [name for name, axis in axes.items() if axis is None]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        logger.warning(
            "sparse.columns: %s applies to weights of linear layers and experts; scalars of other parameters (%s%s) "
            "are drawn as with columns: 1",
            config.columns,
            others[0],
            more,
        )
    columns = {name: Columns(group_of(name), 1, axis) for name, axis in axes.items() if axis is not None}
    if config.columns != "whole":
        return _by_share(config, targets, counts, columns), dict(counts)
    columns = _whole(targets, counts, columns)
    filled = {name: math.prod(each.inner_shape(targets[name].shape)) for name, each in columns.items()}
    wanted = sum(counts[name] for name in filled)
    if sum(filled.values()) > NOTABLE * wanted and any(each.count == 1 for each in columns.values()):
        logger.warning(
            "sparse.columns: whole trains at least one column of each weight: %s scalars, where %s gives %s",
            f"{sum(filled.values()):,}",
            config.budget,
            f"{wanted:,}",
        )
    return columns, dict(counts) | filled


def _by_share(
    config: SparseConfig, targets: Mapping[str, Target], counts: Mapping[str, int], columns: Mapping[str, Columns]
) -> dict[str, Columns]:
    found, needed = {}, {}
    for name, each in columns.items():
        shape = targets[name].shape
        width, lines = shape[each.axis], shape.numel() // shape[each.axis]
        found[name] = Columns(each.group, number_of_columns(config.columns, width), each.axis)
        if counts[name] > found[name].count * lines:
            needed[name] = _least_share(math.ceil(counts[name] / lines), width)
    if needed:
        name = max(needed, key=needed.__getitem__)
        raise UserError(
            f"sparse.columns: {config.columns:g}: gives {name} {found[name].count:,} of its columns, too few for "
            f"{counts[name]:,} scalars; raise columns to at least {needed[name]:g}, or lower the budget "
            f"(sparse.{config.budget})"
        )
    return found


def _least_share(count: int, width: int) -> float:
    """The least share with four decimals that gives at least this number of columns."""
    if count > ALIGNED * ALIGNED:  # what is rounded up to it is enough
        count -= (count - 1) % ALIGNED
    return (10**4 * (count - 1) // width + 1) / 10**4


def number_of_columns(share: float, width: int) -> int:
    """The number of columns for a share of them, rounded up; from 64 on to a multiple of 8."""
    exact = math.ceil(Fraction(str(share)) * width)  # a product of floats may be above a whole number
    if exact >= ALIGNED * ALIGNED:
        exact += -exact % ALIGNED
    return min(exact, width)


def _whole(
    targets: Mapping[str, Target], counts: Mapping[str, int], columns: Mapping[str, Columns]
) -> dict[str, Columns]:
    """As many columns as the counts fill: at least one, the same number in a group, and such that the total of the
    groups so far is as near as possible to that of the counts."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, each in columns.items():
        groups.setdefault((each.group, targets[name].shape[each.axis]), []).append(name)
    found, left = {}, 0
    for (_, width), names in groups.items():
        lines = sum(targets[name].shape.numel() // width for name in names)
        left += sum(counts[name] for name in names)
        number = min(width, max(1, (2 * left + lines) // (2 * lines)))
        left -= number * lines
        found |= {name: Columns(columns[name].group, number, columns[name].axis) for name in names}
    return {name: found[name] for name in columns}


def group_of(name: str) -> str:
    """The path of the module that contains the module of a parameter; of a parameter of the model itself its name."""
    path = [part for part in name.split(".") if part not in LAYER_WRAPPERS]
    return ".".join(path[:-2]) if len(path) > 1 else name


def input_axis(target: Target) -> int | None:
    """The dimension of a weight that an input meets in a product, -1 or -2. None for other parameters, for experts of
    which it cannot be told, and for weights without scalars."""
    if not target.shape.numel():
        return None
    found = {axis for module, name in target.owners if (axis := _axis_of(module, name)) != 0}
    return found.pop() if len(found) == 1 else None


def _axis_of(module: nn.Module, name: str) -> int | None:
    """-1 or -2; 0 for an embedding, which may share the weight of a linear layer; None if it is not known."""
    if isinstance(module, nn.Embedding):
        return 0
    shape = weight_shape(module, name)
    if name == "weight" and isinstance(module, nn.Linear | Conv1D) and len(shape) == 2:
        return -2 if isinstance(module, Conv1D) else -1
    if not is_experts(module) or len(shape) != 3:
        return None
    is_transposed = getattr(module, "is_transposed", None)
    if isinstance(is_transposed, bool):  # transformers' use_experts_implementation
        return -2 if is_transposed else -1
    return _axis_by_sizes(module, shape)


def _axis_by_sizes(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """By the sizes that a layer states, or by those of the first and the second projection of the experts."""
    sizes = tuple(getattr(module, name, None) for name in ("output_size", "input_size"))
    if None not in sizes:
        fits = {-1: tuple(shape[1:]) == sizes, -2: tuple(shape[1:]) == sizes[::-1]}
    else:
        shapes = {name: tuple(full_shape(p)) for name, p in module._parameters.items() if p is not None}
        matrices = {name: each[1:] for name, each in shapes.items() if len(each) == 3}
        down = matrices.pop("down_proj", None)
        if down is None or not matrices:
            return None
        fits = {
            -1: all(_follows(inner, outer, down[1], down[0]) for inner, outer in matrices.values()),
            -2: all(_follows(inner, outer, down[0], down[1]) for outer, inner in matrices.values()),
        }
    return next(axis for axis in fits if fits[axis]) if sum(fits.values()) == 1 else None


def _follows(inner: int, outer: int, down_inner: int, down_outer: int) -> bool:
    """Whether a projection from `outer` to `inner` features, perhaps of gate and up in one, precedes the given one."""
    return outer == down_outer and inner in (down_inner, 2 * down_inner)
