"""columns-v1: scalars that are drawn within some input columns of a weight.

Backward needs the input of a layer only at the columns in which selected scalars lie. They are drawn by the path of
the parent module and the width, so that layers that read the same input (queries, keys and values; gate and up) have
the same columns. The scalars are drawn from the inner weight, which consists of these columns alone.

Shapes: a weight (..., rows, width) with its inputs in the last dimension, as in nn.Linear; or (..., width, rows) with
its inputs in the last but one, as in Conv1D. K drawn columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from sparse_zero.selection.hashes import stratified_draw, stream_key

COLUMNS = "columns-v1"


@dataclass(frozen=True)
class Columns:
    """The drawn columns of a weight."""

    group: str
    """The path of the parent module. Weights of one group and one width have the same columns."""
    count: int
    """K"""
    axis: Literal[-1, -2] = -1
    """The dimension of the weight that its input meets."""

    def drawn(self, seed: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The columns: int64 (K,), sorted. A function of (seed, group, width, K)."""
        key = stream_key(seed, f"{self.group}/{width}", COLUMNS)
        return stratified_draw(key, width, self.count, 0, self.count, device)

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the inner weight of a weight of this shape."""
        return (*shape[:-1], self.count) if self.axis == -1 else (*shape[:-2], self.count, shape[-1])

    def inner_positions(
        self, seed: int, name: str, size: int, count: int, start: int, stop: int, device: torch.device | str
    ) -> torch.Tensor:
        """Draw the selected scalars [start, stop) of `count`, as positions in the flattened inner weight.

        Args:
            name: of the parameter.
            size: number of scalars of the inner weight.

        Returns: int64 (stop - start,), sorted.
        """
        return stratified_draw(stream_key(seed, name, COLUMNS), size, count, start, stop, device)

    def positions(self, inner: torch.Tensor, drawn: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Positions in the flattened weight.

        Args:
            inner: integer (n,), positions in the flattened inner weight.
            drawn: (K,), as from `drawn`; it may be longer.
            shape: of the weight.

        Returns: int64 (n,), in the same order.
        """
        below = 1 if self.axis == -1 else shape[-1]
        inner = inner.long()
        line = torch.div(inner, below, rounding_mode="trunc") if below > 1 else inner
        matrix = torch.div(line, self.count, rounding_mode="trunc")
        column = drawn[line - matrix * self.count].add_(matrix, alpha=shape[self.axis])
        return column if below == 1 else column.mul_(below).add_(inner).sub_(line, alpha=below)

    def inner_starts(self, rows: torch.Tensor, drawn: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The positions in the flattened inner weight at which rows of the weight begin.

        Args:
            rows: int64 (m,), rows of the weight as a single matrix.
            drawn: (K,)
            shape: of the weight.

        Returns: int64 (m,)
        """
        if self.axis == -1:
            return rows * self.count
        matrix = torch.div(rows, shape[-2], rounding_mode="trunc")
        before = torch.searchsorted(drawn, rows - matrix * shape[-2])
        return (matrix * self.count + before) * shape[-1]
