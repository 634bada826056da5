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
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.model.setting import Setting


class Operands(NamedTuple):
    """The arguments of an operator or kernel that writes base + change into a weight at its strips."""

    matrix: torch.Tensor
    """The complete weight, contiguous."""
    base: torch.Tensor
    change: torch.Tensor | None
    strip_indices: torch.Tensor
    columns: int
    granularity: int

    @property
    def kind(self) -> tuple:
        """Operands of the same kind can be written in one call."""
        change = None if self.change is None else self.change.dtype
        return self.matrix.device, self.matrix.dtype, change, self.strip_indices.dtype, self.granularity > 1


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
    matrices, bases, changes, strips, columns, granularities = map(list, zip(*group, strict=True))
    changes = [] if changes[0] is None else changes
    if operators := cpu.loaded_operators(matrices[0]):
        operators.write_all_deltas.default(matrices, bases, changes, strips, columns, granularities)
        return
    from sparse_zero.gradient.triton_kernels import write_all_deltas

    patterns = [
        Pattern(indices, matrix.numel() // width, width, g)
        for matrix, indices, width, g in zip(matrices, strips, columns, granularities, strict=True)
    ]
    write_all_deltas(matrices, bases, changes, patterns)
