"""The difference of a weight as a product B A, as in LoRA (arXiv 2106.09685).

A sparse difference is such a product exactly. With I the r input columns that its positions touch, A (r, in) has the
unit row e_i for each i in I, and B (out, r) has the differences of these columns. If the positions touch fewer output
rows than input columns, B has the unit columns and A the differences.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factored:
    """The difference of E matrices (out, in), by the coordinates of the n changed scalars. E is 1 but for experts."""

    size: tuple[int, int, int]
    """(E, out, in)"""
    coordinates: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """The matrix, the output and the input of each scalar: int64 (n,) each; n > 0."""
    values: torch.Tensor
    """(n,)"""

    @property
    def rank(self) -> int:
        """The smallest rank, among those of unit vectors, that is enough for each of the matrices."""
        return min(self._inputs.rank, self._outputs.rank)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: rank: at least `self.rank`; the rest is zero. Returns: A (E, rank, in) and B (E, out, rank), whose
        product is the difference.
        """
        (matrices, out, into), (matrix, row, column) = self.size, self.coordinates
        factor_a = self.values.new_zeros(matrices, rank, into)
        factor_b = self.values.new_zeros(matrices, out, rank)
        if self._inputs.rank <= self._outputs.rank:
            used = self._inputs
            factor_a[used.matrix, used.place, used.coordinate] = 1
            factor_b[matrix, row, used.place[used.of_scalar]] = self.values
        else:
            used = self._outputs
            factor_b[used.matrix, used.coordinate, used.place] = 1
            factor_a[matrix, used.place[used.of_scalar], column] = self.values
        return factor_a, factor_b

    @functools.cached_property
    def _inputs(self) -> "_Used":
        return _used(self.coordinates[0], self.coordinates[2], self.size[2])

    @functools.cached_property
    def _outputs(self) -> "_Used":
        return _used(self.coordinates[0], self.coordinates[1], self.size[1])


@dataclass(frozen=True)
class _Used:
    """The m inputs, or outputs, that the positions touch, matrix by matrix."""

    matrix: torch.Tensor
    coordinate: torch.Tensor
    place: torch.Tensor
    """The index among those of the same matrix. int64 (m,), as the other two."""
    of_scalar: torch.Tensor
    """The index among all of the input or output of each scalar: int64 (n,)."""

    @property
    def rank(self) -> int:
        return int(self.place.max()) + 1


def _used(matrix: torch.Tensor, coordinate: torch.Tensor, size: int) -> _Used:
    used, of_scalar = torch.unique(matrix * size + coordinate, return_inverse=True)
    matrix_of_used = torch.div(used, size, rounding_mode="trunc")
    first = torch.searchsorted(matrix_of_used, matrix_of_used)
    return _Used(matrix_of_used, used - matrix_of_used * size, torch.arange(used.numel()) - first, of_scalar)
