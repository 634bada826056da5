"""Where the selected scalars of a matrix are.

A strip is g consecutive rows of one column, a scalar a strip of g = 1. Over a matrix of R x C lies a grid of R / g
blocks of rows and C columns, whose cells are the strips: one index for each is all that is stored. A block holds its
n scalars row by row, as a (g, strips) matrix.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels
from sparse_zero.selection.rules import ACCELERATOR_CHUNK, SHARED_CHUNK

BYTES_PER_POSITION = 64
"""What `flat_positions` takes for a moment, at most, beside a few for each block of rows."""


_STARTS = WeakTensorKeyDictionary()
"""(blocks, columns, where the blocks begin) of cells on an accelerator, while these live: to find them takes a few
launches, and beside the cells of a weight they are small."""


@dataclass(eq=False)
class Pattern:
    """The strips of a matrix, told by their cells; on demand by blocks of rows, which for g = 1 is CSR, and on a CPU
    takes as much again."""

    cells: torch.Tensor
    """(n / g,), sorted indices into the flattened grid, int32 or int64."""
    rows: int
    columns: int
    granularity: int = 1

    def __post_init__(self) -> None:
        self.cells = self.cells.contiguous()

    @property
    def blocks(self) -> int:
        return self.rows // self.granularity

    @property
    def count(self) -> int:
        """n"""
        return self.cells.numel() * self.granularity

    @property
    def block_starts(self) -> torch.Tensor:
        """int32 (R / g + 1,), where the strips of each block begin."""
        return self._by_blocks[0] if self._by_blocks else self._searched_starts

    @property
    def strip_columns(self) -> torch.Tensor:
        """int32 (n / g,), sorted in each block."""
        if self._by_blocks:
            return self._by_blocks[1]
        result = torch.empty(self.cells.numel(), dtype=torch.int32, device=self.cells.device)
        return torch.remainder(self.cells, self.columns, out=result)

    @property
    def by_blocks(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(block_starts, strip_columns, granularity)"""
        return self.block_starts, self.strip_columns, self.granularity

    @functools.cached_property
    def _by_blocks(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Both at once, from the operator that a CPU has for it."""
        operators = cpu.loaded(self.cells)
        return operators.pattern.default(self.cells, self.blocks, self.columns) if operators else None

    @functools.cached_property
    def _searched_starts(self) -> torch.Tensor:
        if not has_kernels(self.cells):
            return self._search()
        kept = _STARTS.get(self.cells)
        if kept is None or kept[:2] != (self.blocks, self.columns):
            kept = _STARTS[self.cells] = (self.blocks, self.columns, self._search())
        return kept[2]

    def _search(self) -> torch.Tensor:
        end = self.blocks * self.columns
        dtype = torch.int32 if end < 2**31 else torch.int64
        # Up to the end, so that the last block ends too
        edges = torch.arange(0, end + 1, self.columns, dtype=dtype, device=self.cells.device)
        return torch.searchsorted(self.cells.to(dtype), edges, out_int32=True)

    def flat_chunks(self) -> Iterator[torch.Tensor]:
        """Indices into the flattened matrix, int64, in the order of the scalars, some at a time."""
        for piece in pieces(self.count, _chunk(self.cells.device)):
            yield self.flat_positions(piece)

    def flat_positions(self, piece: slice) -> torch.Tensor:
        """Returns: int64, indices into the flattened matrix of the scalars in `piece` of n."""
        if self.granularity == 1:
            return self.cells[piece].long()
        starts, g, size = self.block_starts.long(), self.granularity, piece.stop - piece.start
        inside = (starts * g).clamp_(piece.start, piece.stop).diff()
        # output_size spares the accelerator a wait
        block = torch.repeat_interleave(inside, output_size=size)
        first, width = starts[block], starts.diff()[block]
        place = torch.arange(piece.start, piece.stop, device=starts.device).sub_(first * g)
        row = block.mul_(g).add_(torch.div(place, width, rounding_mode="trunc"))
        return row.mul_(self.columns).add_(self.cells[place.remainder_(width).add_(first)] % self.columns)


def pieces(count: int, size: int) -> list[slice]:
    """The slices of at most `size` that make up [0, count)."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _chunk(device: torch.device) -> int:
    return SHARED_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
