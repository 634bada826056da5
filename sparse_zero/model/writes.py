"""Writes deltas into many weights at once: one call of an operator or kernel for each device and dtype.

A model has hundreds of selected weights with a few thousand scalars each. Written one by one, the calls would take the
host longer than the writing.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import nn

from sparse_zero.gradient import cpu
from sparse_zero.gradient.pattern import InnerScalars, Pattern
from sparse_zero.model.setting import Setting


class Operands(NamedTuple):
    """The arguments of an operator or kernel that writes base + change into a weight at its selected scalars."""

    matrix: torch.Tensor
    """The complete weight, contiguous."""
    base: torch.Tensor
    change: torch.Tensor | None
    scalars: Pattern | InnerScalars

    @property
    def kind(self) -> tuple:
        """Operands of the same kind can be written in one call."""
        change = None if self.change is None else self.change.dtype
        if isinstance(self.scalars, Pattern):
            scalars = self.scalars.strip_indices.dtype, self.scalars.granularity > 1
        else:
            scalars = (None if self.scalars.indices is None else self.scalars.indices.dtype, "columns")
        return self.matrix.device, self.matrix.dtype, change, scalars


class Due(NamedTuple):
    """What has to be written into a weight."""

    weight: "Writable"
    values: torch.Tensor
    """The complete weight, whose version counter autograd counts, or not."""
    setting: Setting
    is_new: bool
    """Whether the weight does not have it already, as far as one can know without reading the deltas."""


class Writable(Protocol):
    """The part of `model.weight.SparseWeight` that this module and `step_counter` use."""

    delta: nn.Parameter
    is_attached: bool

    def due(self, in_forward: bool = False, checks_data: bool = False) -> Due | None: ...
    def operands(self, values: torch.Tensor, setting: Setting) -> Operands | None: ...
    def write_values(self, values: torch.Tensor, setting: Setting) -> None: ...
    def note_written(self, setting: Setting) -> None: ...


def refresh(weights: Iterable[Writable], in_forward: bool = False, checks_data: bool = False) -> None:
    """Write the deltas into the weights that do not have them already. See `SparseWeight.due`."""
    # Not within `no_grad`: on a GPU it depends on the caller's mode whether changes of `delta.data` are looked for
    writes = [write for weight in weights if (write := weight.due(in_forward, checks_data))]
    with torch.no_grad():
        _write_all(writes)
    for weight, _, setting, is_new in writes:
        if is_new:
            weight.note_written(setting)


def _write_all(writes: list[Due]) -> None:
    together: dict[tuple, list[Operands]] = defaultdict(list)
    for weight, values, setting, _ in writes:
        operands = weight.operands(values, setting)
        if operands is None:
            weight.write_values(values, setting)
        else:
            together[operands.kind].append(operands)
    for group in together.values():
        _write(group)


def _write(group: list[Operands]) -> None:
    """Args: group: operands of one kind."""
    matrices, bases, changes, scalars = map(list, zip(*group, strict=True))
    changes = [] if changes[0] is None else changes
    in_columns = isinstance(scalars[0], InnerScalars)
    if not (operators := cpu.loaded_operators(matrices[0])):
        from sparse_zero.gradient import triton_writes

        write = triton_writes.write_all_columns if in_columns else triton_writes.write_all_deltas
        write(matrices, bases, changes, scalars)
    elif in_columns:
        indices, columns, counts, widths, below = map(list, zip(*scalars, strict=True))
        indices = [] if indices[0] is None else indices
        operators.write_all_columns.default(matrices, bases, changes, indices, columns, counts, widths, below)
    else:
        given = ([p.strip_indices for p in scalars], [p.columns for p in scalars], [p.granularity for p in scalars])
        operators.write_all_deltas.default(matrices, bases, changes, *given)
