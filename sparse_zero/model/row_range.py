"""Ranges of rows of a selected weight, and the part of the delta that belongs to them.

Shapes: a range is a matrix (R, C) or E matrices (E, R, C), with n selected scalars.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sparse_zero.gradient.pattern import AllScalars, Pattern
from sparse_zero.selection.rules import Selection


class SelectedWeight(Protocol):
    """The part of `model.weight.SparseWeight` that other modules use."""

    weight: torch.Tensor
    selection: Selection
    shape: torch.Size
    transient_bytes: int
    warned_of_dense_gradient: bool
    trains: bool
    seen: Any

    def restore(self, seen: Any) -> None: ...
    def effective_delta(self) -> torch.Tensor: ...
    def row_slice(self, first: int, rows: int) -> slice: ...
    def patterns(self, first: int, rows: int, rows_per_pattern: int) -> Iterator[Pattern]: ...
    def inner_patterns(self, first: int, rows: int, rows_per_pattern: int) -> Iterator[Pattern | AllScalars]: ...
    def input_columns(self, axis: int | None) -> torch.Tensor | None: ...
    def flat_positions(self) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class RowRange:
    """Consecutive rows of a weight, as a matrix (R, C) or E matrices."""

    weight: SelectedWeight
    delta: torch.Tensor
    """(n,), in the autograd graph of the weight's delta."""
    first: int
    """The first row, counted in the weight as a single matrix."""
    shape: torch.Size
    """(R, C) or (E, R, C), before any transposition."""
    transposed: bool = False
    """Whether the last two dimensions are swapped."""

    @property
    def rows(self) -> int:
        return self.shape[:-1].numel()

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @functools.cached_property
    def matrices(self) -> list["RowRange"]:
        """Each of the E matrices. They share one split of the delta, so that backward makes one gradient of it."""
        count, shape = self.shape[0], self.shape[1:]
        firsts = [self.first + i * shape[0] for i in range(count)]
        slices = [self.weight.row_slice(first, shape[0]) for first in firsts]
        deltas = self.delta.split([each.stop - each.start for each in slices])
        return [RowRange(self.weight, delta, first, shape) for delta, first in zip(deltas, firsts, strict=True)]

    def part(self, first: int, shape: torch.Size, transposed: bool) -> "RowRange | None":
        """The rows from `first` on, in any shape with C columns. None if the boundaries cut through strips."""
        rows, matrix_rows = shape[:-1].numel(), self.shape[-2]
        if first % self.weight.selection.granularity or shape[-2] % self.weight.selection.granularity:
            return None
        if (first, rows) == (self.first, self.rows):
            return replace(self, shape=shape, transposed=transposed)
        matrix, last = (first - self.first) // matrix_rows, (first + rows - 1 - self.first) // matrix_rows
        if not self.is_matrix and matrix == last:
            return self.matrices[matrix].part(first, shape, transposed)
        here, there = self.weight.row_slice(self.first, self.rows), self.weight.row_slice(first, rows)
        delta = self.delta[there.start - here.start : there.stop - here.start]
        return RowRange(self.weight, delta, first, shape, transposed)

    def of_view(self, view: torch.Tensor, tensor: torch.Tensor) -> "RowRange | None":
        """The rows that a view of `tensor` shows, where `tensor` shows this range.

        It is determined from the memory layout, so it does not depend on the function that made the view.

        Returns: None unless the view consists of whole consecutive rows, in 2 or 3 dimensions.
        """
        columns = self.shape[-1]
        if view.dim() not in (2, 3) or view.dtype != tensor.dtype or not view.numel():
            return None
        if view.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            return None
        row, rest = divmod(view.storage_offset() - tensor.storage_offset(), columns)
        for rows, transposed in ((view, False), (view.mT, True)):
            if rows.shape[-1] == columns and rows.is_contiguous() and not rest:
                return self.part(self.first + row, rows.shape, transposed)
        return None

    @property
    def is_of_whole_matrices(self) -> bool:
        """Whether each matrix shows all rows of a matrix of the weight."""
        height = self.weight.shape[-2] if len(self.weight.shape) > 1 else 1
        return self.shape[-2] == height and self.first % height == 0

    def patterns_for(self, axis: int | None, as_matrix: bool = False) -> Iterator[Pattern | AllScalars]:
        """The pattern of each matrix, for inputs of which `SelectedWeight.input_columns(axis)` were kept.

        Args: as_matrix: the pattern of all rows as one matrix instead.
        """
        draws = self.weight.patterns if self.weight.input_columns(axis) is None else self.weight.inner_patterns
        return draws(self.first, self.rows, self.rows if as_matrix else self.shape[-2])

    def flat_positions(self) -> torch.Tensor:
        """The selected positions in the flattened rows, int64 (n,)."""
        if self.rows == self.weight.shape[:-1].numel():
            return self.weight.flat_positions()
        pattern = next(self.weight.patterns(self.first, self.rows, self.rows))
        return torch.cat([*pattern.flat_chunks()])
