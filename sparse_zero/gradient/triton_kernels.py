"""The sampled gradient on a GPU: Triton kernels for bfloat16, float16 and float32 that add up in float32.

Shapes as in sampled_gradient.py: N tokens, R x C the weight, n positions; g the rows of a strip.

CUDA offers no such product in half precision (pytorch#187681). A position is a dot product over N of a column of
`rows` and a column of `columns`, whose elements lie R and C apart: read in place, each would cost a sector of 32 bytes
for 2. So a piece of N at a time is copied with its tokens last, which moves 2 N (R + C) elements, and then each
position reads its own in a line. What is left, with elements of b bytes:

    sampled   reads n N b bytes of columns and about N b (R + n / 32) of rows, out of the L2 cache, where a piece of
              the columns stays; 2 n N FLOPs, of which a GPU has several times more than it can feed from there
    strips    copies the columns alone: g neighbours in `rows` are whole sectors from g = 16 (bfloat16) on. One column
              serves g positions: n N b / g bytes, and the 2 n N FLOPs are the tensor cores'

Which of these and the dense product costs least is sampled_cost.py's matter. Pieces are added up in their order and no
sum is atomic: the same inputs on the same kind of device give the same bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sparse_zero.gradient.cost import GATHER_TILE, LEAST_ROWS, STEP_BYTES, Pieces, strips_per_tile
from sparse_zero.gradient.pattern import Pattern

CELLS = 256
"""Of one program that reads or writes a matrix at its positions."""


def sampled(rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int) -> torch.Tensor:
    """(rows^T @ columns) at single positions.

    Args:
        rows_NR, columns_NC: bfloat16, float16 or float32, of any strides.
        transient_bytes: bound on what is allocated beside the result; 16 tokens are always copied at once.
    Returns: float32 (n,).
    """
    (N, R), C, n = rows_NR.shape, columns_NC.shape[1], pattern.count
    assert (pattern.rows, pattern.columns) == (R, C), (pattern.rows, pattern.columns, R, C)
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if n == 0 or N == 0:
        return rows_NR.new_zeros(n, dtype=torch.float32)
    result = rows_NR.new_empty(n, dtype=torch.float32)
    pieces = Pieces.of(N, R + C, dtype, transient_bytes, cached=C)
    with torch.cuda.device_of(rows_NR):
        last = rows_NR.new_empty(R + C, pieces.width, dtype=dtype)
        for tokens in _slices(N, pieces.width):
            _tokens_last((rows_NR[tokens], columns_NC[tokens]), last, pieces.block)
            _sampled_kernel[(triton.cdiv(n, GATHER_TILE),)](
                last, pattern.cells, result, n, R, C, pieces.width,
                POSITIONS=GATHER_TILE, TOKENS=pieces.block, FIRST=tokens.start == 0,
            )  # fmt: skip
    return result


def strips(rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int) -> torch.Tensor:
    """(rows^T @ columns) at strips.

    Args: as of `sampled`.
    Returns: float32 (n,): for each block of rows a (granularity, strips) matrix, row-major.
    """
    (N, R), C, count = rows_NR.shape, columns_NC.shape[1], pattern.cells.numel()
    assert (pattern.rows, pattern.columns) == (R, C), (pattern.rows, pattern.columns, R, C)
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if count == 0 or N == 0:
        return rows_NR.new_zeros(pattern.count, dtype=torch.float32)
    result = rows_NR.new_empty(pattern.count, dtype=torch.float32)
    pieces = Pieces.of(N, C, dtype, transient_bytes)
    tile = strips_per_tile(count, pattern.blocks, pattern.granularity)
    padded = max(LEAST_ROWS, triton.next_power_of_2(pattern.granularity))
    # Blocks with more strips than the mean go round again: nobody waits to ask how many there are
    grid = (pattern.blocks, triton.cdiv(triton.cdiv(count, pattern.blocks), tile))
    with torch.cuda.device_of(rows_NR):
        last = columns_NC.new_empty(C, pieces.width, dtype=dtype)
        for tokens in _slices(N, pieces.width):
            rows = rows_NR[tokens]
            _tokens_last((columns_NC[tokens],), last, pieces.block)
            _strips_kernel[grid](
                rows, last, pattern.block_starts, pattern.cells, result,
                rows.shape[0], C, *rows.stride(), pieces.width,
                ROWS=pattern.granularity, PADDED=padded, STRIPS=tile, FIRST=tokens.start == 0,
                **strips_launch(tile, padded, pieces.width, dtype),
            )  # fmt: skip
    return result


def strips_launch(tile: int, padded: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """TOKENS of a step, a power of two that divides `width`, and how a program runs.

    Few warps and long steps are fastest on an H100 (2,048 and 8,192 tokens, matrices of 2048 x 2048 to 11008 x 4096):
    they take half the time of 4 warps with steps of 64 tokens.
    """
    tokens = min(STEP_BYTES // (padded * dtype.itemsize), width & -width)
    return {"TOKENS": max(16, tokens), "num_warps": max(1, min(4, tile * padded // 256)), "num_stages": 3}


def read(some_rows: torch.Tensor, first_row: int, pattern: Pattern, result: torch.Tensor) -> None:
    """result = a matrix at those of its positions that are in these rows, whole blocks of them; others are left alone.

    Args: some_rows: contiguous (rows, C); result: (n,).
    """
    g, C = pattern.granularity, pattern.columns
    assert some_rows.shape[1] == C, (some_rows.shape, C)
    assert result.numel() == pattern.count, (result.shape, pattern.count)
    some = first_row // g * C, (first_row + some_rows.shape[0]) // g * C
    if pattern.count:
        with torch.cuda.device_of(result):
            _read_kernel[(triton.cdiv(pattern.cells.numel(), CELLS),)](
                some_rows, result, pattern.cells, _starts(pattern), pattern.cells.numel(), C, *some, g, CELLS=CELLS
            )


def write_deltas(matrix: torch.Tensor, base: torch.Tensor, change: torch.Tensor | None, pattern: Pattern) -> None:
    """matrix = base + change at its positions, or base; with torch's bits.

    Args: matrix: contiguous, at most 32 bits wide; base: (n,), in its dtype; change: (n,), in its dtype or float32.
    """
    assert matrix.numel() == pattern.rows * pattern.columns, (matrix.numel(), pattern.rows, pattern.columns)
    assert base.numel() == pattern.count, (base.shape, pattern.count)
    assert change is None or change.numel() == pattern.count, (change.shape, pattern.count)
    if strips := pattern.cells.numel():
        with torch.cuda.device_of(matrix):
            _write_kernel[(triton.cdiv(strips, CELLS),)](
                matrix, base, change, pattern.cells, _starts(pattern), strips, pattern.columns, pattern.granularity,
                CELLS=CELLS,
            )  # fmt: skip
        # So that graphs from before see that it has changed
        torch.autograd.graph.increment_version(matrix)


def _starts(pattern: Pattern) -> torch.Tensor | None:
    """Scalars of single positions are where their cells are."""
    return None if pattern.granularity == 1 else pattern.block_starts


def _slices(N: int, width: int) -> Iterator[slice]:
    return (slice(start, start + width) for start in range(0, N, width))


def _tokens_last(matrices: tuple[torch.Tensor, ...], out_XW: torch.Tensor, block: int) -> None:
    """out[:, :N] = x^T of one or two matrices, one below the other, and zeros behind it, so that readers need no
    mask."""
    first, second = matrices[0], matrices[-1]
    (N, X), width = first.shape, out_XW.shape[1]
    tiles = triton.cdiv(X, 64)
    grid = (tiles + (triton.cdiv(second.shape[1], 64) if len(matrices) == 2 else 0), width // block)
    _tokens_last_kernel[grid](
        first, second, out_XW, out_XW[X:], tiles, N, X, second.shape[1], *first.stride(), *second.stride(), width,
        TOKENS=block, FEATURES=64,
    )  # fmt: skip


@triton.jit
def _tokens_last_kernel(
    first, second, out, below, tiles, N, X, Y, stride_N, stride_X, stride_M, stride_Y, width,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < tiles:
        _turn_over(first, out, tile, N, X, stride_N, stride_X, width, TOKENS, FEATURES)
    else:
        _turn_over(second, below, tile - tiles, N, Y, stride_M, stride_Y, width, TOKENS, FEATURES)


@triton.jit
def _turn_over(x, out, tile, N, X, stride_N, stride_X, width, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    # 64 bits: N * R passes 2**31 with long sequences and a large vocabulary
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tile.to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    known = (feature < X)[None, :] & (token < N)[:, None]
    values = tl.load(x + token[:, None] * stride_N + feature[None, :] * stride_X, mask=known, other=0.0)
    place = out + feature[:, None] * width + token[None, :]
    tl.store(place, tl.trans(values).to(out.dtype.element_ty), mask=(feature < X)[:, None])


@triton.jit
def _sampled_kernel(
    last, cells, result, n, R, C, width, POSITIONS: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """Neighbouring positions, whatever their rows are: a row that holds all of them is no worse than another."""
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < n
    cell = tl.load(cells + position, mask=inside, other=0)
    row = cell // C
    column = cell - row * C + R
    row_at = last + row.to(tl.int64)[:, None] * width + tl.arange(0, TOKENS)[None, :]
    column_at = last + column.to(tl.int64)[:, None] * width + tl.arange(0, TOKENS)[None, :]
    sums = tl.full((POSITIONS, TOKENS), 0.0, tl.float32)
    for start in range(0, width, TOKENS):
        # Neighbours share their row, which L1 serves; columns come again only to another program
        a = tl.load(row_at + start)
        b = tl.load(column_at + start, cache_modifier=".cg")
        sums += a.to(tl.float32) * b.to(tl.float32)
    total = tl.sum(sums, axis=1)
    if not FIRST:
        total += tl.load(result + position, mask=inside)
    tl.store(result + position, total, mask=inside)


@triton.jit
def _strips_kernel(
    rows, last, block_starts, cells, result, N, C, stride_N, stride_R, width,
    ROWS: tl.constexpr, PADDED: tl.constexpr, STRIPS: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Some of the strips of one block of rows: (STRIPS, N) gathered columns times (N, ROWS)."""
    block = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(block_starts + block), tl.load(block_starts + block + 1)
    member = tl.arange(0, PADDED)
    real = (member < ROWS)[None, :]
    row_at = rows + (block * ROWS + member)[None, :] * stride_R
    for start in range(first + tl.program_id(1) * STRIPS, stop, tl.num_programs(1) * STRIPS):
        strip = start + tl.arange(0, STRIPS)
        inside = strip < stop
        column = tl.load(cells + strip, mask=inside, other=0).to(tl.int64) - block * C
        column_at = last + tl.where(inside, column, 0)[:, None] * width
        sums = tl.full((STRIPS, PADDED), 0.0, tl.float32)
        for begin in range(0, width, TOKENS):
            token = begin + tl.arange(0, TOKENS)
            b = tl.load(column_at + token[None, :])
            a = tl.load(row_at + token.to(tl.int64)[:, None] * stride_N, mask=real & (token < N)[:, None], other=0.0)
            sums = tl.dot(b, a.to(b.dtype), sums, input_precision="ieee")
        # 32 bits within a block of rows spare registers
        place = result + first.to(tl.int64) * ROWS + (member[None, :] * (stop - first) + (strip - first)[:, None])
        mask = inside[:, None] & real
        if not FIRST:
            sums += tl.load(place, mask=mask)
        tl.store(place, sums, mask=mask)


@triton.jit
def _read_kernel(matrix, result, cells, block_starts, count, C, begin, end, ROWS, CELLS: tl.constexpr):
    """The cells from `begin` on and before `end`, of a matrix that begins with the former's block of rows."""
    strip = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    cell = tl.load(cells + strip, mask=strip < count, other=-1).to(tl.int64)
    inside = (cell >= begin) & (cell < end)
    block = (cell - begin) // C
    column = cell - begin - block * C
    first, width = _block_of(block_starts, cell // C, strip, inside)
    for member in range(ROWS):
        value = tl.load(matrix + (block * ROWS + member) * C + column, mask=inside)
        place = result + first * ROWS + member * width + strip - first
        tl.store(place, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _write_kernel(matrix, base, change, cells, block_starts, count, C, ROWS, CELLS: tl.constexpr):
    strip = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    inside = strip < count
    cell = tl.load(cells + strip, mask=inside, other=0).to(tl.int64)
    block = cell // C
    first, width = _block_of(block_starts, block, strip, inside)
    for member in range(ROWS):
        place = first * ROWS + member * width + strip - first
        value = tl.load(base + place, mask=inside)
        if change is not None:
            value = value.to(tl.float32) + tl.load(change + place, mask=inside).to(tl.float32)
        tl.store(
            matrix + (block * ROWS + member) * C + cell - block * C, value.to(matrix.dtype.element_ty), mask=inside
        )


@triton.jit
def _block_of(block_starts, block, strip, inside):
    """Where the strips of each strip's block begin, and how many there are; of single positions: itself, whose scalar
    is where it is."""
    first, width = strip, strip
    if block_starts is not None:
        first = tl.load(block_starts + block, mask=inside, other=0).to(tl.int64)
        width = tl.load(block_starts + block + 1, mask=inside, other=0).to(tl.int64) - first
    return first, width
