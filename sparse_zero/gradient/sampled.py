"""The gradient of a weight at its selected positions only.

Shapes: N rows of a batch (examples x tokens), R x C the weight, n selected scalars, g the rows of a strip.
    gradient of the weight = rows^T @ columns, with rows (N, R) and columns (N, C)

Two ways lead to it on a CPU, and `cheaper_way` tells which is taken:
    sampled   a dot product over N for each position, after a copy of both matrices with their tokens last (C++)
    dense     the whole product, some rows of the weight at a time, read at the positions
Both work on pieces, so that what they allocate beside inputs, pattern and result stays within a bound, and mostly
within the processor's cache. The least of the dense way is one token and one block of rows at a time. It is taken too
where the bound leaves no room for the sampled way (gradient.cpu.Sizes), or its operator cannot be built.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels, kernel_is_cheaper
from sparse_zero.gradient.pattern import BYTES_PER_POSITION, Pattern, pieces

TRANSIENT_BYTES = 64 * 2**20
"""The default of SparseConfig.transient_mib."""

ALIGNED_ROWS = 64
"""What the rows of a chunk of the dense product are a multiple of, where they are not all."""

TURNED, DOT = 31, 2.7
"""Costs of the sampled way, in multiples of a multiplication of the dense product in float32: a scalar of the inputs
that is turned over, and a multiplication of its own. `python benchmarks/gradient.py` measures them."""

Way = Literal["sampled", "dense"]


def cheaper_way(N: int, R: int, C: int, n: int) -> Way:
    """Which way takes a CPU the least time. A model, and no measurement: all ranks, and a resumed run, choose alike
    (but where one of them cannot build the operator).

    It is the same for strips, and for float16 and bfloat16, which are summed in float32.
    """
    return "sampled" if TURNED * N * (R + C) + DOT * N * n < N * R * C else "dense"


def sampled_product(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int = TRANSIENT_BYTES
) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a pattern, without ever holding the whole product.

    Returns: (n,), float32 (the inputs' own dtype if that is wider).
    """
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    # On a CPU the dense product of half precision sums in half precision, block by block
    dtype = torch.promote_types(torch.promote_types(rows_NR.dtype, columns_NC.dtype), torch.float32)
    if N == 0 or pattern.count == 0:
        return rows_NR.new_zeros(pattern.count, dtype=dtype)
    if rows_NR.device.type != "cpu":
        return _on_accelerator(rows_NR, columns_NC, pattern, transient_bytes).to(dtype)
    way = _WAYS[cheaper_way(N, R, C, pattern.count)]
    return way(rows_NR, columns_NC, pattern, dtype, transient_bytes)


def _on_accelerator(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int
) -> torch.Tensor:
    if kernel_is_cheaper(rows_NR, columns_NC, pattern.count, pattern.granularity, transient_bytes):
        from sparse_zero.gradient import triton_kernels

        kernel = triton_kernels.sampled if pattern.granularity == 1 else triton_kernels.strips
        return kernel(rows_NR, columns_NC, pattern, transient_bytes)
    # Tensor cores sum half precision in float32
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    return _dense(rows_NR, columns_NC, pattern, dtype, transient_bytes)


def _sampled(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    (N, _), C = rows_NR.shape, columns_NC.shape[1]
    sizes = cpu.Sizes.of(N, C, pattern.count, pattern.granularity, dtype, transient_bytes, torch.get_num_threads())
    if sizes is None or not (product := cpu.operator()):
        return _dense(rows_NR, columns_NC, pattern, dtype, transient_bytes)
    return product(rows_NR, columns_NC, *pattern.by_blocks, *sizes, dtype)


def _dense(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    """Dense products of some rows of the weight at a time, each read at its positions and dropped."""
    (N, R), C, g = rows_NR.shape, columns_NC.shape[1], pattern.granularity
    block_rows = g * _at_most(transient_bytes // 2 // (g * C * dtype.itemsize), pattern.blocks)
    if block_rows < R:
        # Tensor cores read an operand that begins at a multiple of 16 bytes in half the time of another
        whole = math.lcm(g, ALIGNED_ROWS)
        block_rows = block_rows // whole * whole or block_rows
    tokens = N
    if not (_is_ready(rows_NR, dtype) and _is_ready(columns_NC, dtype)):
        tokens = _at_most(transient_bytes // 4 // ((block_rows + C) * dtype.itemsize), N)
        if tokens < N and dtype.itemsize < 4:
            # Each piece would round the sum of all before it
            return _dense(rows_NR, columns_NC, pattern, torch.float32, transient_bytes)
    result = rows_NR.new_empty(pattern.count, dtype=torch.promote_types(dtype, torch.float32))
    chunks = pieces(R, block_rows)
    read = _reader(pattern, chunks, transient_bytes // 4)
    for number, chunk in enumerate(chunks):
        product = rows_NR.new_empty(chunk.stop - chunk.start, C, dtype=dtype)
        for piece in pieces(N, tokens):
            beta = float(piece.start > 0)
            product.addmm_(rows_NR[piece, chunk].to(dtype).t(), columns_NC[piece].to(dtype), beta=beta)
        read(number, product, result)
    return result


def _reader(
    pattern: Pattern, chunks: list[slice], transient_bytes: int
) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
    """What reads the positions of one of the chunks of rows, of which the dense product is given, into the result."""
    if len(chunks) == pattern.granularity == 1:
        # At most as much again as the product
        return lambda number, product, result: result.copy_(product.view(-1).index_select(0, pattern.cells))
    if has_kernels(pattern.cells):
        from sparse_zero.gradient import triton_kernels

        return lambda number, product, result: triton_kernels.read(product, chunks[number].start, pattern, result)
    C, g, starts = pattern.columns, pattern.granularity, [0, pattern.count]
    # One wait for an accelerator per weight, and only for weights larger than the bound
    if len(chunks) > 1:
        edges = [0, *(chunk.stop // g for chunk in chunks)]
        starts = [start * g for start in pattern.block_starts[edges].tolist()]

    def read(number: int, product: torch.Tensor, result: torch.Tensor) -> None:
        first, last = starts[number : number + 2]
        for piece in pieces(last - first, max(1, transient_bytes // BYTES_PER_POSITION)):
            places = slice(first + piece.start, first + piece.stop)
            inside = pattern.flat_positions(places) - chunks[number].start * C
            result[places] = product.view(-1).index_select(0, inside)

    return read


_WAYS = {"sampled": _sampled, "dense": _dense}


def _is_ready(x_NX: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a matrix product takes it as it is; it makes copies of others."""
    least, most = sorted(x_NX.stride())
    return x_NX.dtype == dtype and least == 1 and most >= x_NX.shape[x_NX.stride().index(1)]


def _at_most(fits: int, most: int) -> int:
    return max(1, min(fits, most))


def embedding_product(
    ids_N: torch.Tensor,
    grad_NC: torch.Tensor,
    pattern: Pattern,
    transient_bytes: int = TRANSIENT_BYTES,
    padding_idx: int | None = None,
    by_frequency: bool = False,
) -> torch.Tensor:
    """The gradient of an embedding's weight, as F.embedding has it, at the positions of a pattern: the sum of grad
    over the occurrences of each row. Touches the rows in the batch only.

    Args: ids_N: rows that were looked up, not negative; padding_idx: a row without a gradient.
    Returns: (n,), float32 or wider.
    """
    starts, strip_columns, g = pattern.by_blocks
    dtype = torch.promote_types(grad_NC.dtype, torch.float32)
    result = torch.zeros(pattern.count, dtype=dtype, device=grad_NC.device)
    frequency = torch.bincount(ids_N) if by_frequency else None
    # For every pair of an occurrence and a position in its row
    pairs = max(1, transient_bytes // 2 // _BYTES_PER_PAIR)
    for some in pieces(ids_N.numel(), pairs):
        ids = ids_N[some]
        block = torch.div(ids, g, rounding_mode="trunc")
        first = starts[block]
        counts = starts[block + 1] - first
        if padding_idx is not None:
            counts.masked_fill_(ids == padding_idx, 0)
        # The row's place in its block, whose strips it has all
        begin = first.long() * g + (ids - block * g) * counts
        for rows in pieces(ids.numel(), max(1, pairs // max(1, int(counts.max())))):
            inside = counts[rows]
            occurrence = torch.repeat_interleave(inside)
            ends = inside.cumsum(0)
            offset = torch.arange(occurrence.numel(), device=ids.device).sub_((ends - inside)[occurrence])
            column = strip_columns[first[rows][occurrence] + offset]
            values = grad_NC[some][rows][occurrence, column].to(dtype)
            if frequency is not None:
                values /= frequency[ids[rows]][occurrence]
            result.index_add_(0, offset.add_(begin[rows][occurrence]), values)
    return result


_BYTES_PER_PAIR = 64
