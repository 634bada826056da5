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
"""What `flat_positions` takes for a moment, at most; beside it, 32 or so for each row of the blocks that hold them."""


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
        g, size, device = self.granularity, piece.stop - piece.start, self.block_starts.device
        blocks = self._blocks_of(piece)
        starts = self.block_starts[blocks.start : blocks.stop + 1].long()
        rows = torch.arange(blocks.start * g * columns, blocks.stop * g * columns, columns, device=device)
        # Where each row's scalars begin, and where the last one's end
        edges = starts * g
        if g > 1:
            edges = torch.addcmul(edges[:-1, None], torch.arange(g, device=device), starts.diff()[:, None])
            edges = torch.cat([edges.view(-1), starts[-1:] * g])
        inside = edges.clamp(piece.start, piece.stop).diff()
        # output_size spares the accelerator a wait
        positions = torch.repeat_interleave(rows, inside, output_size=size)
        if g == 1:
            return positions.add_(self.strip_columns[piece])
        # From a scalar to its strip: all rows of a block have the same ones
        steps = starts[:-1].repeat_interleave(g, output_size=rows.numel()) - edges[:-1]
        strips = torch.repeat_interleave(steps, inside, output_size=size)
        strips += torch.arange(piece.start, piece.stop, device=device)
        return positions.add_(self.strip_columns[strips])

    def _blocks_of(self, piece: slice) -> slice:
        """Those that hold the scalars in `piece`. An accelerator would have to be waited for: there, all blocks."""
        if self.block_starts.device.type != "cpu":
            return slice(0, self.blocks)
        g = self.granularity
        first = int(torch.searchsorted(self.block_starts, piece.start // g, right=True)) - 1
        return slice(first, int(torch.searchsorted(self.block_starts, -(-piece.stop // g))))


def pieces(count: int, size: int) -> list[slice]:
    """The slices of at most `size` that make up [0, count)."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _chunk(device: torch.device) -> int:
    return SHARED_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
