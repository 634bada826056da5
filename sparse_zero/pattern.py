"""Where the selected scalars of a matrix are.

A strip is g consecutive rows of one column, a scalar a strip of g = 1. Over a matrix of R x C lies a grid of R / g
blocks of rows and C columns, whose cells are the strips: one index for each is all that is stored. A block holds its
n scalars row by row, as a (g, strips) matrix.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sparse_zero import sampled_cpu
from sparse_zero.selection import ACCELERATOR_CHUNK, SHARED_CHUNK

BYTES_PER_POSITION = 64
"""What `flat_positions` takes for a moment, at most, beside a few for each block of rows."""


class Pattern(NamedTuple):
    """The strips of a matrix by blocks of rows; with g = 1 its rows and columns in CSR."""

    block_starts: torch.Tensor
    """int32 (R / g + 1,), where the strips of each block begin."""
    strip_columns: torch.Tensor
    """int32 (n / g,), sorted in each block."""
    granularity: int = 1

    @classmethod
    def of_cells(cls, cells: torch.Tensor, rows: int, columns: int, granularity: int = 1) -> "Pattern":
        """Args: cells: (n / g,), sorted indices into the flattened grid; rows, columns: of the matrix."""
        blocks = rows // granularity
        cells = cells.contiguous()
        if operators := sampled_cpu.loaded(cells):
            return cls(*operators.pattern.default(cells, blocks, columns), granularity)
        dtype = torch.int32 if blocks * columns < 2**31 else torch.int64
        # Up to blocks * columns, so that the last block ends too
        edges = torch.arange(0, blocks * columns + 1, columns, dtype=dtype, device=cells.device)
        starts = torch.searchsorted(cells.to(dtype), edges, out_int32=True)
        strip_columns = torch.empty(cells.numel(), dtype=torch.int32, device=cells.device)
        torch.remainder(cells, columns, out=strip_columns)
        return cls(starts, strip_columns, granularity)

    @property
    def blocks(self) -> int:
        return self.block_starts.numel() - 1

    @property
    def count(self) -> int:
        """n"""
        return self.strip_columns.numel() * self.granularity

    def flat_chunks(self, columns: int) -> Iterator[torch.Tensor]:
        """Indices into the flattened matrix, int64, in the order of the scalars, some at a time."""
        for piece in pieces(self.count, _chunk(self.block_starts.device)):
            yield self.flat_positions(columns, piece)

    def flat_positions(self, columns: int, piece: slice) -> torch.Tensor:
        """Returns: int64, indices into the flattened matrix of the scalars in `piece` of n."""
        starts, g, size = self.block_starts.long(), self.granularity, piece.stop - piece.start
        inside = (starts * g).clamp_(piece.start, piece.stop).diff()
        if g == 1:
            rows = torch.arange(0, self.blocks * columns, columns, dtype=torch.int64, device=starts.device)
            # output_size spares the accelerator a wait
            return torch.repeat_interleave(rows, inside, output_size=size).add_(self.strip_columns[piece])
        block = torch.repeat_interleave(inside, output_size=size)
        first, width = starts[block], starts.diff()[block]
        place = torch.arange(piece.start, piece.stop, device=starts.device).sub_(first * g)
        row = block.mul_(g).add_(torch.div(place, width, rounding_mode="trunc"))
        return row.mul_(columns).add_(self.strip_columns[place.remainder_(width).add_(first)])


def pieces(count: int, size: int) -> list[slice]:
    """The slices of at most `size` that make up [0, count)."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _chunk(device: torch.device) -> int:
    return SHARED_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
