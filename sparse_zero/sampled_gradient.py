"""The gradient of a weight at its selected positions only.

Shapes: N rows of a batch (examples x tokens), R x C the weight, n selected scalars, g the rows of a strip.
    gradient of the weight = rows^T @ columns, with rows (N, R) and columns (N, C)

Three ways lead to it, and `cheaper_way` tells which is taken:
    sampled   a dot product over N for each position, after a copy of both matrices with their tokens last
    strips    for each block of rows a matrix product with the columns that it has selected, gathered
    dense     the whole product, some rows of the weight at a time, read at the positions
Each works on pieces, so that what it allocates beside its inputs, the pattern and the result stays within a bound, and
mostly within the processor's cache. (One token and one block of rows at a time is the least.)
"""

import functools
import itertools
import warnings
from typing import Literal

import torch

from sparse_zero.pattern import BYTES_PER_POSITION, Pattern, pieces
from sparse_zero.sampled_cost import kernel_is_cheaper

TRANSIENT_BYTES = 64 * 2**20
"""The default of SparseConfig.transient_mib."""

TOKENS = 128
"""At a time in the sampled way and in that of strips. Measured from 64 to 1,024 at 768 to 4096 square: up to 3 times
faster than all of 1,024 at once."""

TURNED, DOT = 30, 5.5
"""Costs of the sampled way, in multiples of a multiplication of the dense product: a scalar of the inputs that is
turned over, and a multiplication of its own. `python benchmarks/gradient.py` measures all of these."""

BLOCK, GATHERED, STRIP = 75, 50, 0.7
"""Costs of strips: a scalar of the rows, a scalar of the columns that is gathered, a multiplication."""

Way = Literal["sampled", "strips", "dense"]


def cheaper_way(N: int, R: int, C: int, n: int, granularity: int) -> Way:
    """Which way takes a CPU the least time. A model, and no measurement: all ranks, and a resumed run, choose alike.

    float16 and bfloat16 make no difference to it: they are summed in float32, and casting a piece costs little.
    """
    return min(costs := expected_costs(N, R, C, n, granularity), key=costs.__getitem__)


def expected_costs(N: int, R: int, C: int, n: int, granularity: int) -> dict[Way, float]:
    """In multiples of a multiplication of the dense product."""
    dense = N * R * C
    if granularity == 1:
        return {"sampled": TURNED * N * (R + C) + DOT * N * n, "dense": dense}
    return {"strips": BLOCK * N * R + GATHERED * N * n // granularity + STRIP * N * n, "dense": dense}


def sampled_product(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int = TRANSIENT_BYTES
) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a pattern, without ever holding the whole product.

    Returns: (n,), float32 (the inputs' own dtype if that is wider).
    """
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    # On a CPU half precision sums in half precision block by block, and the sampled kernel does not take it at all
    dtype = torch.promote_types(torch.promote_types(rows_NR.dtype, columns_NC.dtype), torch.float32)
    if N == 0 or pattern.count == 0:
        return rows_NR.new_zeros(pattern.count, dtype=dtype)
    if rows_NR.device.type != "cpu":
        return _on_accelerator(rows_NR, columns_NC, pattern, transient_bytes).to(dtype)
    way = _WAYS[cheaper_way(N, R, C, pattern.count, pattern.granularity)]
    return way(rows_NR, columns_NC, pattern, dtype, transient_bytes)


def _on_accelerator(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, transient_bytes: int
) -> torch.Tensor:
    if kernel_is_cheaper(rows_NR, columns_NC, pattern.count, pattern.granularity, transient_bytes):
        from sparse_zero import sampled_triton

        if pattern.granularity == 1:
            return sampled_triton.sampled(rows_NR, columns_NC, *pattern[:2], transient_bytes)
        return sampled_triton.strips(rows_NR, columns_NC, *pattern, transient_bytes)
    # Tensor cores sum half precision in float32
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    return _dense(rows_NR, columns_NC, pattern, dtype, transient_bytes)


def _sampled(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    _silence_beta_notice()
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    room = sum(x.shape[1] * _bytes_turned(x, dtype) for x in (rows_NR, columns_NC))
    tokens = _at_most(transient_bytes // room, min(N, TOKENS))
    rows_last, columns_last = (_TokensLast(x, dtype, tokens) for x in (rows_NR, columns_NC))
    sums = torch.sparse_csr_tensor(
        *pattern[:2], rows_NR.new_zeros(pattern.count, dtype=dtype), (R, C), check_invariants=False
    )
    for piece in pieces(N, tokens):
        # Both are as the kernel reads them: it copies any other layout
        torch.sparse.sampled_addmm(sums, rows_last.piece(piece), columns_last.piece(piece).t(), out=sums)
    return sums.values()


class _TokensLast:
    """Pieces of x (N, X) as (X, tokens) matrices, in buffers that serve each piece again: fresh memory costs more than
    the copy."""

    def __init__(self, x_NX: torch.Tensor, dtype: torch.dtype, tokens: int) -> None:
        self.x_NX = x_NX
        self._turned = x_NX.new_empty(x_NX.shape[1] * tokens)
        self._cast = self._turned if x_NX.dtype == dtype else torch.empty_like(self._turned, dtype=dtype)

    def piece(self, tokens: slice) -> torch.Tensor:
        x_XT = self.x_NX[tokens].t()
        turned, cast = (buffer[: x_XT.numel()].view(x_XT.shape) for buffer in (self._turned, self._cast))
        # In its own dtype: torch turns over block by block where nothing else is to be done
        turned.copy_(x_XT)
        return turned if self._cast is self._turned else cast.copy_(turned)


def _bytes_turned(x_NX: torch.Tensor, dtype: torch.dtype) -> int:
    """Of each scalar."""
    return dtype.itemsize + (x_NX.dtype.itemsize if x_NX.dtype != dtype else 0)


@functools.cache
def _silence_beta_notice() -> None:
    """torch says once per process that CSR tensors are in beta; spend that once where nobody sees it."""
    with warnings.catch_warnings(action="ignore"):
        torch.eye(1).to_sparse_csr()


def _strips(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    """Blocks have about as many strips each: those with fewer are filled up, and what comes of that is left out."""
    N, C = columns_NC.shape
    starts, strip_columns, g = pattern
    widths = starts.diff()
    width = int(widths.max())
    # What is cast, and what index_select makes of a layout that it does not take
    tokens = _at_most(transient_bytes // 4 // (2 * C * dtype.itemsize), min(N, TOKENS))
    # Twice the operands: the product copies those of some layouts
    per_block = 2 * dtype.itemsize * tokens * (width + g) + width * (_BYTES_PER_SUM * g + _BYTES_PER_STRIP)
    result = rows_NR.new_empty(pattern.count, dtype=dtype)
    within = torch.arange(width, device=starts.device)
    for blocks in pieces(pattern.blocks, _at_most(transient_bytes // 2 // per_block, pattern.blocks)):
        first = starts[blocks, None]
        chosen = strip_columns[(first + within).clamp_(max=strip_columns.numel() - 1).flatten()]
        height = blocks.stop - blocks.start
        sums = rows_NR.new_zeros(height, g, width, dtype=dtype)
        for piece in pieces(N, tokens):
            rows = rows_NR[piece, blocks.start * g : blocks.stop * g].to(dtype)
            # Cast before it is gathered, which is slow in half precision
            gathered = columns_NC[piece].to(dtype).index_select(1, chosen)
            sums.baddbmm_(
                rows.unflatten(1, (height, g)).permute(1, 2, 0), gathered.unflatten(1, (height, width)).transpose(0, 1)
            )
        inside = (within < widths[blocks, None])[:, None].expand_as(sums)
        start = int(starts[blocks.start]) * g
        values = sums.masked_select(inside)
        result[start : start + values.numel()] = values
    return result


_BYTES_PER_SUM, _BYTES_PER_STRIP = 48, 32
"""With what masked_select takes for a moment; of their indices."""


def _dense(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    """Dense products of some rows of the weight at a time, each read at its positions and dropped."""
    (N, R), C, g = rows_NR.shape, columns_NC.shape[1], pattern.granularity
    block_rows = g * _at_most(transient_bytes // 2 // (g * C * dtype.itemsize), pattern.blocks)
    tokens = N
    if not (_is_ready(rows_NR, dtype) and _is_ready(columns_NC, dtype)):
        tokens = _at_most(transient_bytes // 4 // ((block_rows + C) * dtype.itemsize), N)
    reads = max(1, transient_bytes // 4 // BYTES_PER_POSITION)
    result = rows_NR.new_empty(pattern.count, dtype=dtype)
    chunks = pieces(R, block_rows)
    # One wait for the accelerator per weight, and only for weights larger than the bound.
    starts = [0, pattern.count]
    if len(chunks) > 1:
        edges = [0, *(chunk.stop // g for chunk in chunks)]
        starts = [start * g for start in pattern.block_starts[edges].tolist()]
    for chunk, (start, stop) in zip(chunks, itertools.pairwise(starts), strict=True):
        product = rows_NR.new_empty(chunk.stop - chunk.start, C, dtype=dtype)
        for piece in pieces(N, tokens):
            rows, columns = rows_NR[piece, chunk].to(dtype), columns_NC[piece].to(dtype)
            product.addmm_(rows.t(), columns, beta=float(piece.start > 0))
        for piece in pieces(stop - start, reads):
            places = slice(start + piece.start, start + piece.stop)
            inside = pattern.flat_positions(C, places).sub_(chunk.start * C)
            torch.index_select(product.view(-1), 0, inside, out=result[places])
    return result


_WAYS = {"sampled": _sampled, "strips": _strips, "dense": _dense}


def _is_ready(x_NX: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a matrix product takes it as it is; it makes copies of others."""
    least, most = sorted(x_NX.stride())
    return x_NX.dtype == dtype and least == 1 and most >= x_NX.shape[x_NX.stride().index(1)]


def _at_most(fits: int, most: int) -> int:
    return max(1, min(fits, most))


def embedding_product(
    ids_N: torch.Tensor, grad_NC: torch.Tensor, pattern: Pattern, transient_bytes: int = TRANSIENT_BYTES
) -> torch.Tensor:
    """The gradient of an embedding's weight at the positions of a pattern: the sum of grad over the occurrences of
    each row. Touches the rows in the batch only.

    Args: ids_N: rows that were looked up.
    Returns: (n,), float32 or wider.
    """
    starts, strip_columns, g = pattern
    dtype = torch.promote_types(grad_NC.dtype, torch.float32)
    result = torch.zeros(pattern.count, dtype=dtype, device=grad_NC.device)
    # For every pair of an occurrence and a position in its row
    pairs = max(1, transient_bytes // 2 // _BYTES_PER_PAIR)
    for some in pieces(ids_N.numel(), pairs):
        ids = ids_N[some]
        block = torch.div(ids, g, rounding_mode="trunc")
        first = starts[block]
        counts = starts[block + 1] - first
        # The row's place in its block, whose strips it has all
        begin = first.long() * g + (ids - block * g) * counts
        for rows in pieces(ids.numel(), max(1, pairs // max(1, int(counts.max())))):
            inside = counts[rows]
            occurrence = torch.repeat_interleave(inside)
            ends = inside.cumsum(0)
            offset = torch.arange(occurrence.numel(), device=ids.device).sub_((ends - inside)[occurrence])
            column = strip_columns[first[rows][occurrence] + offset]
            values = grad_NC[some][rows][occurrence, column].to(dtype)
            result.index_add_(0, offset.add_(begin[rows][occurrence]), values)
    return result


_BYTES_PER_PAIR = 64
