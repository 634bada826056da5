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

from sparse_zero.sampled_cost import GATHER_TILE, Pieces, strips_per_tile

LEAST_ROWS = 16
"""The tensor cores' tile: strips of fewer rows are padded to it."""


def sampled(
    rows_NR: torch.Tensor,
    columns_NC: torch.Tensor,
    row_starts: torch.Tensor,
    column_index: torch.Tensor,
    transient_bytes: int,
) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a CSR pattern.

    Args:
        rows_NR, columns_NC: bfloat16, float16 or float32, of any strides.
        row_starts: int32 (R + 1,), where each row's positions begin; column_index: int32 (n,), sorted in each row.
        transient_bytes: bound on what is allocated beside the result; 16 tokens are always copied at once.
    Returns: float32 (n,).
    """
    (N, R), C, n = rows_NR.shape, columns_NC.shape[1], column_index.numel()
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    result = rows_NR.new_zeros(n, dtype=torch.float32)
    if n == 0:
        return result
    pieces = Pieces.of(N, R + C, C, dtype, transient_bytes)
    with torch.cuda.device_of(rows_NR):
        rows_last = rows_NR.new_empty(R, pieces.width, dtype=dtype)
        columns_last = columns_NC.new_empty(C, pieces.width, dtype=dtype)
        for tokens in _slices(N, pieces.width):
            _tokens_last(rows_NR[tokens], rows_last, pieces.block)
            _tokens_last(columns_NC[tokens], columns_last, pieces.block)
            _sampled_kernel[(triton.cdiv(n, GATHER_TILE),)](
                rows_last, columns_last, row_starts, column_index, result, n, R, R.bit_length(), pieces.width,
                POSITIONS=GATHER_TILE, TOKENS=pieces.block,
            )  # fmt: skip
    return result


def strips(
    rows_NR: torch.Tensor,
    columns_NC: torch.Tensor,
    block_starts: torch.Tensor,
    strip_columns: torch.Tensor,
    granularity: int,
    transient_bytes: int,
) -> torch.Tensor:
    """(rows^T @ columns) at strips of `granularity` rows of one column, in the order of selection.strips.

    Args:
        rows_NR, columns_NC, transient_bytes: as in `sampled`; granularity divides R.
        block_starts: int32 (R / granularity + 1,), where the strips of each block of rows begin.
        strip_columns: int32 (n / granularity,), sorted in each block.
    Returns: float32 (n,): for each block of rows a (granularity, strips) matrix, row-major.
    """
    (N, R), C, count = rows_NR.shape, columns_NC.shape[1], strip_columns.numel()
    blocks = block_starts.numel() - 1
    assert blocks * granularity == R, (R, blocks, granularity)
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    result = rows_NR.new_zeros(count * granularity, dtype=torch.float32)
    if count == 0:
        return result
    pieces = Pieces.of(N, C, C, dtype, transient_bytes)
    tile = strips_per_tile(count, blocks, granularity)
    # Blocks with more strips than the mean go round again: nobody waits to ask how many there are
    grid = (blocks, triton.cdiv(triton.cdiv(count, blocks), tile))
    with torch.cuda.device_of(rows_NR):
        columns_last = columns_NC.new_empty(C, pieces.width, dtype=dtype)
        for tokens in _slices(N, pieces.width):
            rows = rows_NR[tokens]
            _tokens_last(columns_NC[tokens], columns_last, pieces.block)
            _strips_kernel[grid](
                rows, columns_last, block_starts, strip_columns, result, rows.shape[0], *rows.stride(), pieces.width,
                ROWS=granularity, PADDED=max(LEAST_ROWS, triton.next_power_of_2(granularity)), STRIPS=tile,
                TOKENS=min(64, pieces.block),
            )  # fmt: skip
    return result


def _slices(N: int, width: int) -> Iterator[slice]:
    return (slice(start, start + width) for start in range(0, N, width))


def _tokens_last(x_NX: torch.Tensor, out_XW: torch.Tensor, block: int) -> None:
    """out[:, :N] = x^T, and zeros behind it, so that readers need no mask."""
    (N, X), width = x_NX.shape, out_XW.shape[1]
    grid = (triton.cdiv(X, 64), width // block)
    _tokens_last_kernel[grid](x_NX, out_XW, N, X, *x_NX.stride(), width, TOKENS=block, FEATURES=64)


@triton.jit
def _tokens_last_kernel(
    x, out, N, X, stride_N, stride_X, width, TOKENS: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    # 64 bits: N * R passes 2**31 with long sequences and a large vocabulary
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(0).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    known = (feature < X)[None, :] & (token < N)[:, None]
    tile = tl.load(x + token[:, None] * stride_N + feature[None, :] * stride_X, mask=known, other=0.0)
    place = out + feature[:, None] * width + token[None, :]
    tl.store(place, tl.trans(tile).to(out.dtype.element_ty), mask=(feature < X)[:, None])


@triton.jit
def _sampled_kernel(
    rows, columns, row_starts, column_index, result, n, R, row_bits, width,
    POSITIONS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Neighbouring positions, whatever their rows are: a row that holds all of them is no worse than another."""
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < n
    position = tl.where(inside, position, 0)

    # The last row that begins at or before the position, so one that holds some. row_starts stays in L1.
    row = tl.full((POSITIONS,), 0, tl.int32)
    beyond = row + R
    for _ in range(row_bits):
        middle = row + (beyond - row) // 2
        begun = tl.load(row_starts + middle) <= position
        row = tl.where(begun, middle, row)
        beyond = tl.where(begun, beyond, middle)

    column = tl.load(column_index + position)
    row_at = rows + row.to(tl.int64)[:, None] * width + tl.arange(0, TOKENS)[None, :]
    column_at = columns + column.to(tl.int64)[:, None] * width + tl.arange(0, TOKENS)[None, :]
    sums = tl.full((POSITIONS, TOKENS), 0.0, tl.float32)
    for start in range(0, width, TOKENS):
        # Neighbours share their row, which L1 serves; columns come again only to another program
        a = tl.load(row_at + start)
        b = tl.load(column_at + start, cache_modifier=".cg")
        sums += a.to(tl.float32) * b.to(tl.float32)
    place = result + position
    tl.store(place, tl.load(place, mask=inside) + tl.sum(sums, axis=1), mask=inside)


@triton.jit
def _strips_kernel(
    rows, columns, block_starts, strip_columns, result, N, stride_N, stride_R, width,
    ROWS: tl.constexpr, PADDED: tl.constexpr, STRIPS: tl.constexpr, TOKENS: tl.constexpr,
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
        column = tl.load(strip_columns + strip, mask=inside, other=0)
        column_at = columns + column.to(tl.int64)[:, None] * width
        sums = tl.full((STRIPS, PADDED), 0.0, tl.float32)
        for begin in range(0, width, TOKENS):
            token = begin + tl.arange(0, TOKENS)
            b = tl.load(column_at + token[None, :])
            a = tl.load(row_at + token.to(tl.int64)[:, None] * stride_N, mask=real & (token < N)[:, None], other=0.0)
            sums = tl.dot(b, a.to(b.dtype), sums, input_precision="ieee")
        # 32 bits within a block of rows spare registers
        place = result + first.to(tl.int64) * ROWS + (member[None, :] * (stop - first) + (strip - first)[:, None])
        mask = inside[:, None] & real
        tl.store(place, tl.load(place, mask=mask) + sums, mask=mask)
