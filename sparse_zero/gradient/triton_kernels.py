"""The sampled gradient on a GPU: Triton kernels for bfloat16, float16 and float32, with sums in float32.

Shapes as in sampled.py: N tokens, an R x C weight, n selected positions, g rows in a strip.

CUDA has no such product in half precision (pytorch#187681). Each position needs the dot product over N of a column of
`rows` and a column of `columns`. The elements of these columns are R and C elements apart in memory: read in place,
each read of 2 bytes would transfer a sector of 32. Therefore the kernels copy a chunk of tokens at a time with the
tokens last, which moves 2 N (R + C) elements. Then each position reads contiguous memory. With elements of b bytes:

    sampled   reads n N b bytes of columns and about N b (R + n / 32) bytes of rows from the L2 cache, which a chunk of
              the columns fits into. It computes 2 n N FLOPs, several times fewer than a GPU can do in that time.
    strips    copies only the columns: g adjacent elements of `rows` fill whole sectors if g >= 16 (bfloat16). One
              column is used for g positions, which makes n N b / g bytes. The tensor cores compute the 2 n N FLOPs.

No kernel reads or writes outside of its tensors, whatever the strip indices are: those outside of the matrix, or not
sorted, are left out. They are checked before they come here (checks.checked_chunks); a check here would wait for the
device.

cost.py chooses between these kernels and the dense product. Chunks are added in order and no addition is atomic: the
same inputs on the same type of device give the same bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sparse_zero.gradient.cost import GATHER_TILE, MIN_ROWS, STEP_BYTES, TokenChunks, strips_per_tile
from sparse_zero.gradient.pattern import Pattern

TILE_STRIPS = 256
"""Number of strips per program of the kernels that read or write a matrix at its selected positions."""


def sampled(rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a pattern with granularity 1.

    Args:
        rows_NR, columns_NC: (N, R) and (N, C) in bfloat16, float16 or float32, with any strides.
        pattern: the selected positions in the R x C weight.
        transient_bytes: limit for temporary memory. At least 16 tokens are copied at a time, whatever the limit.

    Returns:
        float32 (n,).
    """
    (N, R), C, n = rows_NR.shape, columns_NC.shape[1], pattern.count
    assert (pattern.rows, pattern.columns) == (R, C), (pattern.rows, pattern.columns, R, C)
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if n == 0 or N == 0:
        return rows_NR.new_zeros(n, dtype=torch.float32)
    result = rows_NR.new_empty(n, dtype=torch.float32)
    chunks = TokenChunks.fit(N, R + C, dtype, transient_bytes, cached=C)
    with torch.cuda.device_of(rows_NR):
        last = rows_NR.new_empty(R + C, chunks.width, dtype=dtype)
        for tokens in _slices(N, chunks.width):
            _tokens_last((rows_NR[tokens], columns_NC[tokens]), last, chunks.block)
            _sampled_kernel[(triton.cdiv(n, GATHER_TILE),)](
                last, pattern.strip_indices, result, n, R, C, chunks.width,
                POSITIONS=GATHER_TILE, TOKENS=chunks.block, FIRST=tokens.start == 0,
            )  # fmt: skip
    return result


def strips(rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a pattern of strips.

    Args:
        rows_NR, columns_NC, pattern, transient_bytes: as for `sampled`.

    Returns:
        float32 (n,): for each block of rows a (granularity, strips) matrix, row by row.
    """
    (N, R), C, count = rows_NR.shape, columns_NC.shape[1], pattern.strip_indices.numel()
    assert (pattern.rows, pattern.columns) == (R, C), (pattern.rows, pattern.columns, R, C)
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if count == 0 or N == 0:
        return rows_NR.new_zeros(pattern.count, dtype=torch.float32)
    result = rows_NR.new_empty(pattern.count, dtype=torch.float32)
    chunks = TokenChunks.fit(N, C, dtype, transient_bytes)
    tile = strips_per_tile(count, pattern.blocks, pattern.granularity)
    padded = max(MIN_ROWS, triton.next_power_of_2(pattern.granularity))
    # Programs of blocks with more strips than the mean loop, so that the host need not wait for the numbers of strips
    grid = (pattern.blocks, triton.cdiv(triton.cdiv(count, pattern.blocks), tile))
    with torch.cuda.device_of(rows_NR):
        last = columns_NC.new_empty(C, chunks.width, dtype=dtype)
        for tokens in _slices(N, chunks.width):
            rows = rows_NR[tokens]
            _tokens_last((columns_NC[tokens],), last, chunks.block)
            _strips_kernel[grid](
                rows, last, pattern.block_starts, pattern.strip_indices, result,
                rows.shape[0], C, *rows.stride(), chunks.width,
                ROWS=pattern.granularity, PADDED=padded, STRIPS=tile, FIRST=tokens.start == 0,
                **strips_launch(tile, padded, chunks.width, dtype),
            )  # fmt: skip
    return result


def strips_launch(tile: int, padded: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """How to launch the strips kernel: TOKENS of a step, a power of two that divides `width`, and numbers of warps and
    stages.

    Few warps and long steps are fastest on an H100 (2,048 and 8,192 tokens, matrices of 2048 x 2048 to 11008 x 4096):
    twice as fast as 4 warps with steps of 64 tokens.
    """
    tokens = min(STEP_BYTES // (padded * dtype.itemsize), width & -width)
    return {"TOKENS": max(16, tokens), "num_warps": max(1, min(4, tile * padded // 256)), "num_stages": 3}


def gather(some_rows: torch.Tensor, first_row: int, pattern: Pattern, result: torch.Tensor) -> None:
    """Copy the selected scalars in some rows of a matrix to `result`. The rest of `result` does not change.

    Args:
        some_rows: (rows, C), contiguous: complete blocks of rows of an R x C matrix.
        first_row: the number of the first of these rows in the matrix.
        pattern: the selected positions in the matrix.
        result: (n,).
    """
    g, C = pattern.granularity, pattern.columns
    assert some_rows.shape[1] == C, (some_rows.shape, C)
    assert result.numel() == pattern.count, (result.shape, pattern.count)
    some = first_row // g * C, (first_row + some_rows.shape[0]) // g * C
    if pattern.count:
        with torch.cuda.device_of(result):
            count = pattern.strip_indices.numel()
            _gather_kernel[(triton.cdiv(count, TILE_STRIPS),)](
                some_rows, result, pattern.strip_indices, starts_of(pattern), count, C, *some, g,
                STRIPS=TILE_STRIPS,
            )  # fmt: skip


def starts_of(pattern: Pattern) -> torch.Tensor | None:
    """The `block_starts` of a pattern for a kernel: None with granularity 1, where scalar i belongs to strip i."""
    return None if pattern.granularity == 1 else pattern.block_starts


def _slices(N: int, width: int) -> Iterator[slice]:
    return (slice(start, start + width) for start in range(0, N, width))


def _tokens_last(matrices: tuple[torch.Tensor, ...], out_XW: torch.Tensor, block: int) -> None:
    """Set out[:, :N] to the transposes of one or two (N, X) matrices, one below the other, and the rest to zero.

    With the zeros the kernels that read `out` need no mask.
    """
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
        _transpose_tile(first, out, tile, N, X, stride_N, stride_X, width, TOKENS, FEATURES)
    else:
        _transpose_tile(second, below, tile - tiles, N, Y, stride_M, stride_Y, width, TOKENS, FEATURES)


@triton.jit
def _transpose_tile(x, out, tile, N, X, stride_N, stride_X, width, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    # 64 bits, because N * R exceeds 2**31 with long sequences and a large vocabulary
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tile.to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    known = (feature < X)[None, :] & (token < N)[:, None]
    values = tl.load(x + token[:, None] * stride_N + feature[None, :] * stride_X, mask=known, other=0.0)
    place = out + feature[:, None] * width + token[None, :]
    tl.store(place, tl.trans(values).to(out.dtype.element_ty), mask=(feature < X)[:, None])


@triton.jit
def _sampled_kernel(
    last, strip_indices, result, n, R, C, width, POSITIONS: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """Computes POSITIONS consecutive positions, which may be in different rows."""
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < n
    index = tl.load(strip_indices + position, mask=inside, other=0)
    row = index // C
    index = tl.where((index >= 0) & (row < R), index, 0)
    row = index // C
    column = index - row * C + R
    row_at = last + row.to(tl.int64)[:, None] * width + tl.arange(0, TOKENS)[None, :]
    column_at = last + column.to(tl.int64)[:, None] * width + tl.arange(0, TOKENS)[None, :]
    sums = tl.full((POSITIONS, TOKENS), 0.0, tl.float32)
    for start in range(0, width, TOKENS):
        # Adjacent positions share a row, which L1 caches. Only other programs read the same columns again.
        a = tl.load(row_at + start)
        b = tl.load(column_at + start, cache_modifier=".cg")
        sums += a.to(tl.float32) * b.to(tl.float32)
    total = tl.sum(sums, axis=1)
    if not FIRST:
        total += tl.load(result + position, mask=inside)
    tl.store(result + position, total, mask=inside)


@triton.jit
def _strips_kernel(
    rows, last, block_starts, strip_indices, result, N, C, stride_N, stride_R, width,
    ROWS: tl.constexpr, PADDED: tl.constexpr, STRIPS: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Computes STRIPS strips of one block of rows: gathered columns (STRIPS, N) times rows (N, ROWS)."""
    block = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(block_starts + block), tl.load(block_starts + block + 1)
    member = tl.arange(0, PADDED)
    real = (member < ROWS)[None, :]
    row_at = rows + (block * ROWS + member)[None, :] * stride_R
    for start in range(first + tl.program_id(1) * STRIPS, stop, tl.num_programs(1) * STRIPS):
        strip = start + tl.arange(0, STRIPS)
        inside = strip < stop
        column = tl.load(strip_indices + strip, mask=inside, other=0).to(tl.int64) - block * C
        column_at = last + tl.where(inside & (column >= 0) & (column < C), column, 0)[:, None] * width
        sums = tl.full((STRIPS, PADDED), 0.0, tl.float32)
        for begin in range(0, width, TOKENS):
            token = begin + tl.arange(0, TOKENS)
            b = tl.load(column_at + token[None, :])
            a = tl.load(row_at + token.to(tl.int64)[:, None] * stride_N, mask=real & (token < N)[:, None], other=0.0)
            sums = tl.dot(b, a.to(b.dtype), sums, input_precision="ieee")
        # 32-bit offsets within a block of rows save registers
        place = result + first.to(tl.int64) * ROWS + (member[None, :] * (stop - first) + (strip - first)[:, None])
        mask = inside[:, None] & real
        if not FIRST:
            sums += tl.load(place, mask=mask)
        tl.store(place, sums, mask=mask)


@triton.jit
def _gather_kernel(matrix, result, strip_indices, block_starts, count, C, begin, end, ROWS, STRIPS: tl.constexpr):
    """Reads the strips with indices in [begin, end) from a matrix that starts with the block of rows of `begin`."""
    strip = tl.program_id(0).to(tl.int64) * STRIPS + tl.arange(0, STRIPS)
    index = tl.load(strip_indices + strip, mask=strip < count, other=-1).to(tl.int64)
    inside = (index >= begin) & (index < end)
    block = (index - begin) // C
    column = index - begin - block * C
    first, width, inside = block_of(block_starts, index // C, strip, inside)
    for member in range(ROWS):
        value = tl.load(matrix + (block * ROWS + member) * C + column, mask=inside)
        place = result + first * ROWS + member * width + strip - first
        tl.store(place, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def block_of(block_starts, block, strip, inside):
    """The number of the first strip in each strip's block, the number of strips in the block, and whether the strip is
    one of them.

    Without block_starts (granularity 1) each strip counts as a block, so that scalar i belongs to strip i.
    """
    first, width = strip, strip
    if block_starts is not None:
        first = tl.load(block_starts + block, mask=inside, other=0).to(tl.int64)
        width = tl.load(block_starts + block + 1, mask=inside, other=0).to(tl.int64) - first
        inside = inside & (strip >= first) & (strip < first + width)
    return first, width, inside
