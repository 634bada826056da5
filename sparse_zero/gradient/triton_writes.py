"""Writing the deltas into weights on a GPU: Triton kernels for one matrix, or for all due ones in one launch.

Shapes as in triton_kernels.py. No kernel writes outside of its tensors: positions that do not fit are left out.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparse_zero.gradient.pattern import InnerScalars, Pattern
from sparse_zero.gradient.triton_kernels import TILE_STRIPS, block_of, starts_of


def write_deltas(matrix: torch.Tensor, base: torch.Tensor, change: torch.Tensor | None, pattern: Pattern) -> None:
    """Set a matrix to base + change at its selected positions, with the same bits as torch.

    Args:
        matrix: contiguous, of a dtype of at most 32 bits.
        base: (n,), in the matrix's dtype.
        change: (n,), in the matrix's dtype or float32; None stands for zeros.
        pattern: the selected positions in the matrix.
    """
    assert matrix.numel() == pattern.rows * pattern.columns, (matrix.numel(), pattern.rows, pattern.columns)
    assert base.numel() == pattern.count, (base.shape, pattern.count)
    assert change is None or change.numel() == pattern.count, (change.shape, pattern.count)
    if count := pattern.strip_indices.numel():
        with torch.cuda.device_of(matrix):
            _write_kernel[(triton.cdiv(count, TILE_STRIPS),)](
                matrix, base, change, pattern.strip_indices, starts_of(pattern), count,
                pattern.blocks * pattern.columns, pattern.columns, pattern.granularity, STRIPS=TILE_STRIPS,
            )  # fmt: skip
        # Lets autograd detect the change in graphs that have saved the matrix
        torch.autograd.graph.increment_version(matrix)


def write_all_deltas(
    matrices: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    changes: Sequence[torch.Tensor],
    patterns: Sequence[Pattern],
) -> None:
    """`write_deltas` for many matrices in one launch.

    Args:
        matrices, bases: as for `write_deltas`, all on one device and of one dtype.
        changes: empty for zeros, otherwise all of one dtype.
        patterns: with strip indices of one dtype, and all with granularity 1 or none.
    """
    tensors, numbers = [], []
    for matrix, base, change, pattern in zip(
        matrices, bases, changes or [None] * len(matrices), patterns, strict=True
    ):
        assert matrix.numel() == pattern.rows * pattern.columns, (matrix.numel(), pattern.rows, pattern.columns)
        assert base.numel() == pattern.count, (base.shape, pattern.count)
        assert change is None or change.numel() == pattern.count, (change.shape, pattern.count)
        indices, C = pattern.strip_indices, pattern.columns
        tensors.append((matrix, base, change, indices, starts_of(pattern)))
        numbers.append((indices.numel(), pattern.blocks * C, C, pattern.granularity))
    _launch(_write_all_kernel, tensors, numbers)


def write_all_columns(
    matrices: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    changes: Sequence[torch.Tensor],
    scalars: Sequence[InnerScalars],
) -> None:
    """Set weights with drawn columns to base + change at their selected scalars, in one launch.

    Args:
        matrices, bases, changes: as for `write_all_deltas`; the weights may have more than two dimensions.
        scalars: the selected scalars of each weight, with indices of one dtype or all without.
    """
    tensors, numbers = [], []
    for matrix, base, change, inner in zip(matrices, bases, changes or [None] * len(matrices), scalars, strict=True):
        size = inner.size_in(matrix)
        count = size if inner.indices is None else inner.indices.numel()
        assert base.numel() == count, (base.shape, count)
        assert change is None or change.numel() == count, (change.shape, count)
        tensors.append((matrix, base, change, inner.indices, inner.columns))
        numbers.append((count, size, inner.count, inner.width, inner.below))
    _launch(_write_all_columns_kernel, tensors, numbers)


def _launch(
    kernel: triton.JITFunction,
    tensors: list[tuple[torch.Tensor | None, ...]],
    numbers: list[tuple[int, ...]],
) -> None:
    """Launch a kernel for many matrices.

    Args:
        tensors: POINTERS for each matrix, which is the first of them.
        numbers: for each matrix, how many strips are written, and what else the kernel needs.
    """
    given = [tensor for each in tensors for tensor in each if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in given), "a tensor is not contiguous"
    pointers = [[0 if tensor is None else tensor.data_ptr() for tensor in each] for each in tensors]
    rows = tuple((*places, *each) for places, each in zip(pointers, numbers, strict=True))
    with torch.cuda.device_of(given[0]):
        table, owners = _table(rows, given[0].device)
        if owners.numel():
            kernel[(owners.numel(),)](table, owners, *tensors[0], STRIPS=TILE_STRIPS, COLUMNS=table.shape[1])
    # Lets autograd detect the change in graphs that have saved the matrices
    torch.autograd.graph.increment_version([each[0] for each in tensors])


POINTERS = 5
"""The number of tensors of a matrix that the kernels for many matrices read or write."""


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels for many matrices read. Pointers stay the same from step to step, so it is copied to the device
    once.

    Args: rows: for each matrix POINTERS pointers, the number of its strips, and other numbers.

    Returns:
        table: int64 (matrices, length of a row + 1), the rows and the number of the first program of each.
        owners: int32 (programs,), the matrix of each program.
    """
    programs = [-(-row[POINTERS] // TILE_STRIPS) for row in rows]
    table = [(*row, first) for row, first in zip(rows, itertools.accumulate(programs, initial=0), strict=False)]
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    return torch.tensor(table, dtype=torch.int64).to(device), owners.to(device)


@triton.jit
def _write_kernel(matrix, base, change, strip_indices, block_starts, count, end, C, ROWS, STRIPS: tl.constexpr):
    """Args: end: the number of strips in the grid."""
    tile = tl.program_id(0).to(tl.int64)
    _write_tile(matrix, base, change, strip_indices, block_starts, tile, count, end, C, ROWS, STRIPS)


@triton.jit
def _write_all_kernel(
    table, owners, matrix, base, change, strip_indices, block_starts, STRIPS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """`_write_kernel` for the matrices of a table of pointers. The other arguments only have the pointers' types."""
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * COLUMNS
    matrix_at = tl.load(row).to(matrix.dtype)
    base_at = tl.load(row + 1).to(base.dtype)
    strips_at = tl.load(row + 3).to(strip_indices.dtype)
    count, end, C, ROWS = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    tile = tl.program_id(0) - tl.load(row + 9)
    change_at, starts_at = change, block_starts
    if change is not None:
        change_at = tl.load(row + 2).to(change.dtype)
    if block_starts is not None:
        starts_at = tl.load(row + 4).to(block_starts.dtype)
    _write_tile(matrix_at, base_at, change_at, strips_at, starts_at, tile, count, end, C, ROWS, STRIPS)


@triton.jit
def _write_all_columns_kernel(
    table, owners, matrix, base, change, indices, columns, STRIPS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """As `_write_all_kernel`, for scalars of inner weights (see `InnerScalars`); without indices, for all of these."""
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * COLUMNS
    matrix_at = tl.load(row).to(matrix.dtype)
    base_at = tl.load(row + 1).to(base.dtype)
    columns_at = tl.load(row + 4).to(columns.dtype)
    n, size, count, width, below = (
        tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9),
    )  # fmt: skip
    scalar = (tl.program_id(0) - tl.load(row + 10)) * STRIPS + tl.arange(0, STRIPS)
    inside = scalar < n
    index = scalar
    if indices is not None:
        index = tl.load(tl.load(row + 3).to(indices.dtype) + scalar, mask=inside, other=-1).to(tl.int64)
    inside = inside & (index >= 0) & (index < size)
    line = index // below
    matrix_number = line // count
    column = tl.load(columns_at + line - matrix_number * count, mask=inside, other=-1)
    inside = inside & (column >= 0) & (column < width)
    value = tl.load(base_at + scalar, mask=inside)
    if change is not None:
        change_at = tl.load(row + 2).to(change.dtype)
        value = value.to(tl.float32) + tl.load(change_at + scalar, mask=inside).to(tl.float32)
    place = (matrix_number * width + column) * below + index - line * below
    tl.store(matrix_at + place, value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _write_tile(matrix, base, change, strip_indices, block_starts, tile, count, end, C, ROWS, STRIPS: tl.constexpr):
    strip = tile * STRIPS + tl.arange(0, STRIPS)
    index = tl.load(strip_indices + strip, mask=strip < count, other=-1).to(tl.int64)
    inside = (index >= 0) & (index < end)
    block = index // C
    first, width, inside = block_of(block_starts, block, strip, inside)
    for member in range(ROWS):
        place = first * ROWS + member * width + strip - first
        value = tl.load(base + place, mask=inside)
        if change is not None:
            value = value.to(tl.float32) + tl.load(change + place, mask=inside).to(tl.float32)
        tl.store(
            matrix + (block * ROWS + member) * C + index - block * C, value.to(matrix.dtype.element_ty), mask=inside
        )
