"""Which rows of a selected weight a tensor shows, and which part of its delta lies in them.

Shapes: W a weight as a matrix of R x C, or E of them; n selected scalars within what is shown.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sparse_zero.gradient.pattern import Pattern
from sparse_zero.selection.rules import Selection


class SelectedWeight(Protocol):
    """What is asked of a weight here and by its readers; `model.weight.SparseWeight` has it."""

    weight: torch.Tensor
    selection: Selection
    shape: torch.Size
    transient_bytes: int
    told_of_dense_gradient: bool

    def change(self) -> torch.Tensor: ...
    def span(self, first: int, rows: int) -> slice: ...
    def patterns(self, first: int, rows: int, each: int) -> Iterator[Pattern]: ...
    def flat_positions(self) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class RowRange:
    """Rows of a weight, one after another, as a matrix (R, C) or as E of them."""

    weight: SelectedWeight
    change: torch.Tensor
    """(n,), in the graph of the delta."""
    first: int
    """The first row, counted in the weight as a single matrix."""
    shape: torch.Size
    """(R, C) or (E, R, C), before any transposition."""
    transposed: bool = False
    """Whether the last two dimensions are shown the other way round."""

    @property
    def rows(self) -> int:
        return self.shape[:-1].numel()

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @functools.cached_property
    def matrices(self) -> list["RowRange"]:
        """Each of E. All together they cost one gradient of the delta, not one each."""
        several, shape = self.shape[0], self.shape[1:]
        firsts = [self.first + i * shape[0] for i in range(several)]
        spans = [self.weight.span(first, shape[0]) for first in firsts]
        changes = self.change.split([span.stop - span.start for span in spans])
        return [RowRange(self.weight, change, first, shape) for change, first in zip(changes, firsts, strict=True)]

    def part(self, first: int, shape: torch.Size, transposed: bool) -> "RowRange | None":
        """Some of its rows, in any shape of C columns. None where they cut through strips."""
        rows, each = shape[:-1].numel(), self.shape[-2]
        if first % self.weight.selection.granularity or shape[-2] % self.weight.selection.granularity:
            return None
        if (first, rows) == (self.first, self.rows):
            return replace(self, shape=shape, transposed=transposed)
        matrix, last = (first - self.first) // each, (first + rows - 1 - self.first) // each
        if not self.is_matrix and matrix == last:
            return self.matrices[matrix].part(first, shape, transposed)
        whole, some = self.weight.span(self.first, self.rows), self.weight.span(first, rows)
        change = self.change[some.start - whole.start : some.stop - whole.start]
        return RowRange(self.weight, change, first, shape, transposed)

    def of_view(self, view: torch.Tensor, shown: torch.Tensor) -> "RowRange | None":
        """What a view of `shown`, which shows these rows, shows. Told by where it lies in memory, whatever made it.

        Returns: None unless that is whole rows, one after another, in 2 or 3 dimensions.
        """
        columns = self.shape[-1]
        if view.dim() not in (2, 3) or view.dtype != shown.dtype or not view.numel():
            return None
        if view.untyped_storage().data_ptr() != shown.untyped_storage().data_ptr():
            return None
        row, rest = divmod(view.storage_offset() - shown.storage_offset(), columns)
        for rows, transposed in ((view, False), (view.mT, True)):
            if rows.shape[-1] == columns and rows.is_contiguous() and not rest:
                return self.part(self.first + row, rows.shape, transposed)
        return None

    def pattern(self) -> Pattern:
        """Of its rows as one matrix."""
        return next(self.weight.patterns(self.first, self.rows, self.rows))

    def patterns(self) -> Iterator[Pattern]:
        """Of each matrix."""
        return self.weight.patterns(self.first, self.rows, self.shape[-2])

    def flat_positions(self) -> torch.Tensor:
        """Returns: int64 (n,), the selected positions in its flattened rows."""
        if self.rows == self.weight.shape[:-1].numel():
            return self.weight.flat_positions()
        return torch.cat([*self.pattern().flat_chunks()])
