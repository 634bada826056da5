"""The positions of the selected scalars of a matrix.

A strip is g consecutive rows of one column; with g = 1 it is a single scalar. An R x C matrix is divided into R / g
blocks of g rows, which form a grid of (R / g) x C possible strips. Only the index of each selected strip in the
flattened grid is stored. The selected scalars of a block are ordered row by row, as a (g, strips) matrix.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels
from sparse_zero.selection.draws import ACCELERATOR_CHUNK, SHARED_CHUNK

BYTES_PER_POSITION = 64
"""Upper limit for the temporary memory of `flat_positions`, plus a few bytes for each block of rows."""


_BLOCK_STARTS = WeakTensorKeyDictionary()
"""A cache of (blocks, columns, block_starts) by the strip indices' tensor, on an accelerator. It saves a few kernel
launches, and its size is small compared with the strip indices. An entry exists as long as its tensor."""


@dataclass(frozen=True)
class AllScalars:
    """The pattern of a matrix of which every scalar is selected."""

    rows: int
    columns: int

    @property
    def count(self) -> int:
        """The number of selected scalars, n."""
        return self.rows * self.columns


class InnerScalars(NamedTuple):
    """The selected scalars of a weight with drawn columns (see selection/columns.py), to write them.

    The weight consists of matrices of D columns, each of s scalars: s is 1 where the columns are the last dimension.
    Its inner weight has the K drawn columns of each matrix. Position i in the inner weight belongs to the column
    q = i // s, and is (q // K * D + columns[q % K]) * s + i % s in the weight.
    """

    indices: torch.Tensor | None
    """int32 or int64 (n,), sorted positions in the inner weight; None if all of its scalars are selected."""
    columns: torch.Tensor
    """int64, the drawn columns, sorted. Those from K on do not count."""
    count: int
    """K"""
    width: int
    """D"""
    below: int
    """s"""

    def size_in(self, weight: torch.Tensor) -> int:
        """The number of scalars of the inner weight of a weight."""
        assert weight.numel() % (self.width * self.below) == 0, (weight.shape, self.width, self.below)
        assert 0 < self.count <= min(self.width, self.columns.numel()), (self.count, self.width, self.columns.shape)
        return weight.numel() // self.width * self.count


@dataclass(eq=False)
class Pattern:
    """The selected strips of a matrix, as indices into the grid and, on demand, by block of rows (CSR if g = 1).

    The second form needs as much memory again on a CPU.
    """

    strip_indices: torch.Tensor
    """int32 or int64 (n / g,), sorted indices into the flattened grid."""
    rows: int
    columns: int
    granularity: int = 1

    def __post_init__(self) -> None:
        self.strip_indices = self.strip_indices.contiguous()

    @property
    def blocks(self) -> int:
        """The number of blocks of rows, R / g."""
        return self.rows // self.granularity

    @property
    def count(self) -> int:
        """The number of selected scalars, n."""
        return self.strip_indices.numel() * self.granularity

    @property
    def block_starts(self) -> torch.Tensor:
        """int32 (R / g + 1,): the offset of each block's first strip, and the number of strips."""
        return self._by_blocks[0] if self._by_blocks else self._searched_starts

    @property
    def strip_columns(self) -> torch.Tensor:
        """int32 (n / g,): the column of each strip, sorted within each block."""
        if self._by_blocks:
            return self._by_blocks[1]
        result = torch.empty(self.strip_indices.numel(), dtype=torch.int32, device=self.strip_indices.device)
        return torch.remainder(self.strip_indices, self.columns, out=result)

    @property
    def by_blocks(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(block_starts, strip_columns, granularity)"""
        return self.block_starts, self.strip_columns, self.granularity

    @functools.cached_property
    def _by_blocks(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """block_starts and strip_columns, computed together by the CPU operator if it is loaded."""
        operators = cpu.loaded_operators(self.strip_indices)
        return operators.pattern.default(self.strip_indices, self.blocks, self.columns) if operators else None

    @functools.cached_property
    def _searched_starts(self) -> torch.Tensor:
        if not has_kernels(self.strip_indices):
            return self._search()
        cached = _BLOCK_STARTS.get(self.strip_indices)
        if cached is None or cached[:2] != (self.blocks, self.columns):
            cached = _BLOCK_STARTS[self.strip_indices] = (self.blocks, self.columns, self._search())
        return cached[2]

    def _search(self) -> torch.Tensor:
        end = self.blocks * self.columns
        dtype = torch.int32 if end < 2**31 else torch.int64
        # The edges include the end of the last block
        edges = torch.arange(0, end + 1, self.columns, dtype=dtype, device=self.strip_indices.device)
        return torch.searchsorted(self.strip_indices.to(dtype), edges, out_int32=True)

    def flat_chunks(self) -> Iterator[torch.Tensor]:
        """The positions of all selected scalars in the flattened matrix, int64, in chunks."""
        for chunk in chunk_slices(self.count, _chunk_size(self.strip_indices.device)):
            yield self.flat_positions(chunk)

    def flat_positions(self, chunk: slice) -> torch.Tensor:
        """The positions of the selected scalars [chunk.start, chunk.stop) in the flattened matrix, int64."""
        if self.granularity == 1:
            return self.strip_indices[chunk].long()
        starts, g, size = self.block_starts.long(), self.granularity, chunk.stop - chunk.start
        inside = (starts * g).clamp_(chunk.start, chunk.stop).diff()
        # output_size avoids a synchronization with the accelerator
        block = torch.repeat_interleave(inside, output_size=size)
        first, width = starts[block], starts.diff()[block]
        offset = torch.arange(chunk.start, chunk.stop, device=starts.device).sub_(first * g)
        row = block.mul_(g).add_(torch.div(offset, width, rounding_mode="trunc"))
        return row.mul_(self.columns).add_(self.strip_indices[offset.remainder_(width).add_(first)] % self.columns)


def chunk_slices(count: int, size: int) -> list[slice]:
    """Divide the range [0, count) into slices of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _chunk_size(device: torch.device) -> int:
    return SHARED_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
