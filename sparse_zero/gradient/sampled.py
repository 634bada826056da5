"""The gradient of a weight at its selected positions only.

Shapes: N tokens of a batch (examples x length), an R x C weight, n selected scalars, g rows in a strip.
    gradient of the weight = rows^T @ columns, with rows (N, R) and columns (N, C)

There are two methods on a CPU, and `cheaper_method` chooses between them:
    sampled   a dot product over N for each position, after both matrices are copied with the tokens last (C++)
    dense     the complete product, computed for some rows of the weight at a time and read at the positions
Both work on chunks, so that their temporary memory (in addition to inputs, pattern and result) stays within a limit
and mostly within the CPU's cache. The smallest chunk of the dense method is one token and one block of rows. The dense
method is also used if the limit is too small for the sampled method (gradient.cpu.Tiling) or if the operator of the
sampled method cannot be compiled.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels, kernel_is_cheaper
from sparse_zero.gradient.pattern import BYTES_PER_POSITION, AllScalars, Pattern, chunk_slices

TRANSIENT_BYTES = 64 * 2**20
"""Default limit for temporary memory, that of SparseConfig.transient_mib."""

ALIGNED_ROWS = 64
"""The number of rows in a chunk of the dense product is a multiple of this, unless one chunk contains all rows."""

BLOCK_COLUMNS, LEAST_BLOCK_COLUMNS = 128, 32
"""A CPU computes a product of at most BLOCK_COLUMNS rows in blocks of at most that many columns, but not in blocks of
fewer than LEAST_BLOCK_COLUMNS. Measured from 8 to 102 rows with 768 to 2,816 columns on two threads."""

TRANSPOSE_COST, DOT_COST = 31, 2.7
"""Costs of the sampled method for each transposed scalar of the inputs and for each of its multiplications, relative
to a multiplication of the dense product in float32. `python benchmarks/gradient.py` measures them."""

Method = Literal["sampled", "dense"]


def cheaper_method(N: int, R: int, C: int, n: int) -> Method:
    """The method that is expected to be faster on a CPU.

    The choice depends only on the shapes, not on measured times, so that all ranks and a resumed run choose alike,
    unless one of them cannot compile the operator. It is the same for strips, and for float16 and bfloat16, whose
    products are summed in float32.
    """
    return "sampled" if TRANSPOSE_COST * N * (R + C) + DOT_COST * N * n < N * R * C else "dense"


def sampled_product(
    rows_NR: torch.Tensor,
    columns_NC: torch.Tensor,
    pattern: Pattern | AllScalars,
    transient_bytes: int = TRANSIENT_BYTES,
) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a pattern, without computing the complete product at once.

    Args:
        rows_NR: (N, R), the gradient of a linear layer's output.
        columns_NC: (N, C), the layer's input.
        pattern: the selected positions in the R x C weight. For AllScalars, both may have further columns, which are
            ignored.
        transient_bytes: limit for temporary memory.

    Returns:
        (n,), in float32 or, if it is wider, in the dtype of the inputs.
    """
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    # On a CPU a dense product in half precision is summed in half precision, block by block
    dtype = _dtype_of_sums(rows_NR.dtype, columns_NC.dtype)
    if N == 0 or pattern.count == 0:
        return rows_NR.new_zeros(pattern.count, dtype=dtype)
    if isinstance(pattern, AllScalars):
        return _complete(rows_NR, columns_NC, pattern, dtype, transient_bytes)
    if rows_NR.device.type != "cpu":
        return _on_accelerator(rows_NR, columns_NC, pattern, transient_bytes).to(dtype)
    method = _METHODS[cheaper_method(N, R, C, pattern.count)]
    return method(rows_NR, columns_NC, pattern, dtype, transient_bytes)


@functools.cache
def _dtype_of_sums(rows: torch.dtype, columns: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(rows, columns), torch.float32)


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
    tiling = cpu.Tiling.fit(N, C, pattern.count, pattern.granularity, dtype, transient_bytes, torch.get_num_threads())
    if tiling is None or not (product := cpu.load_operator()):
        return _dense(rows_NR, columns_NC, pattern, dtype, transient_bytes)
    return product(rows_NR, columns_NC, *pattern.by_blocks, *tiling, dtype)


def _dense(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: Pattern, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    """The dense product, for some rows of the weight at a time. Each chunk is read at its positions and freed."""
    (N, R), C, g = rows_NR.shape, columns_NC.shape[1], pattern.granularity
    chunk_rows = g * _between_one_and(pattern.blocks, transient_bytes // 2 // (g * C * dtype.itemsize))
    if chunk_rows < R:
        # Tensor cores read operands that are aligned to 16 bytes twice as fast as others
        aligned = math.lcm(g, ALIGNED_ROWS)
        chunk_rows = chunk_rows // aligned * aligned or chunk_rows
    tokens = N
    if not (_needs_no_copy(rows_NR, dtype) and _needs_no_copy(columns_NC, dtype)):
        tokens = _between_one_and(N, transient_bytes // 4 // ((chunk_rows + C) * dtype.itemsize))
        if tokens < N and dtype.itemsize < 4:
            # Each chunk of tokens would round the sum so far
            return _dense(rows_NR, columns_NC, pattern, torch.float32, transient_bytes)
    result = rows_NR.new_empty(pattern.count, dtype=torch.promote_types(dtype, torch.float32))
    chunks = chunk_slices(R, chunk_rows)
    gather = _make_gather(pattern, chunks, transient_bytes // 4)
    for number, chunk in enumerate(chunks):
        product = rows_NR.new_empty(chunk.stop - chunk.start, C, dtype=dtype)
        for token_slice in chunk_slices(N, tokens):
            beta = float(token_slice.start > 0)
            product.addmm_(rows_NR[token_slice, chunk].to(dtype).t(), columns_NC[token_slice].to(dtype), beta=beta)
        gather(number, product, result)
    return result


def _complete(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, pattern: AllScalars, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    """The dense product, (n,) of `dtype`."""
    if rows_NR.device.type != "cpu":
        # Tensor cores sum half precision in float32
        product_dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
        product = _sum_over_tokens(rows_NR, columns_NC, 1, product_dtype, transient_bytes)[0]
        return product[: pattern.rows, : pattern.columns].to(dtype).flatten()
    R, C = rows_NR.shape[1], columns_NC.shape[1]
    if C < R:  # several times faster with the few columns first
        blocks_BCR = _sum_over_tokens(columns_NC, rows_NR, _blocks_of_product(C, R), dtype, transient_bytes)
        product = blocks_BCR.mT if pattern.columns == C else blocks_BCR.mT[..., : pattern.columns]
        return product.reshape(-1)[: pattern.count]
    blocks_BRC = _sum_over_tokens(rows_NR, columns_NC, _blocks_of_product(R, C), dtype, transient_bytes)
    product = blocks_BRC.transpose(0, 1)[: pattern.rows].reshape(pattern.rows, C)
    return (product if pattern.columns == C else product[:, : pattern.columns]).flatten()


def _blocks_of_product(few: int, many: int) -> int:
    """The number of blocks of columns in which a CPU computes a product of `few` rows and `many` columns.

    Several threads take hardly less time than one for a product of a few rows as a whole: they divide the blocks.
    """
    width = math.gcd(many, BLOCK_COLUMNS)
    return many // width if few <= BLOCK_COLUMNS and width >= LEAST_BLOCK_COLUMNS else 1


def _sum_over_tokens(
    few_NR: torch.Tensor, many_NC: torch.Tensor, blocks: int, dtype: torch.dtype, transient_bytes: int
) -> torch.Tensor:
    """few^T @ many, as blocks of columns: (blocks, R, C / blocks)."""
    (N, R), C = few_NR.shape, many_NC.shape[1]
    tokens = N
    if not (_needs_no_copy(few_NR, dtype) and _needs_no_copy(many_NC, dtype)):
        tokens = _between_one_and(N, transient_bytes // ((R + C) * 4))
    if tokens < N:  # each chunk of tokens would round the sum so far
        dtype = torch.promote_types(dtype, torch.float32)
    product = few_NR.new_empty(blocks, R, C // blocks, dtype=dtype)
    for chunk in chunk_slices(N, tokens):
        few, many, beta = few_NR[chunk].to(dtype).t(), many_NC[chunk].to(dtype), float(chunk.start > 0)
        if blocks == 1:
            product[0].addmm_(few, many, beta=beta)
        else:
            many = many.view(-1, blocks, C // blocks).transpose(0, 1)
            product.baddbmm_(few.expand(blocks, -1, -1), many, beta=beta)
    return product


def _make_gather(
    pattern: Pattern, chunks: list[slice], transient_bytes: int
) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
    """A function (chunk number, dense product of this chunk of rows, result) that copies the selected scalars."""
    if len(chunks) == pattern.granularity == 1:
        return lambda number, product, result: _read(product.view(-1), pattern.strip_indices, result)
    if has_kernels(pattern.strip_indices):
        from sparse_zero.gradient import triton_kernels

        return lambda number, product, result: triton_kernels.gather(product, chunks[number].start, pattern, result)
    C, g, starts = pattern.columns, pattern.granularity, [0, pattern.count]
    # Synchronizes with an accelerator once per weight, and only for weights larger than the limit
    if len(chunks) > 1:
        edges = [0, *(chunk.stop // g for chunk in chunks)]
        starts = [start * g for start in pattern.block_starts[edges].tolist()]

    def gather(number: int, product: torch.Tensor, result: torch.Tensor) -> None:
        first, last = starts[number : number + 2]
        for part in chunk_slices(last - first, max(1, transient_bytes // BYTES_PER_POSITION)):
            scalars = slice(first + part.start, first + part.stop)
            positions = pattern.flat_positions(scalars) - chunks[number].start * C
            result[scalars] = product.view(-1).index_select(0, positions)

    return gather


def _read(scalars: torch.Tensor, indices: torch.Tensor, result: torch.Tensor) -> None:
    """Set `result` to scalars[indices]."""
    if scalars.dtype == result.dtype:
        torch.index_select(scalars, 0, indices, out=result)
    else:  # the temporary tensor is at most as large as `scalars`
        result.copy_(scalars.index_select(0, indices))


_METHODS = {"sampled": _sampled, "dense": _dense}


def _needs_no_copy(x_NX: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's matrix product reads the tensor directly, by its dtype and strides."""
    if x_NX.is_contiguous():
        return x_NX.dtype == dtype
    smaller, larger = sorted(x_NX.stride())
    return x_NX.dtype == dtype and smaller == 1 and larger >= x_NX.shape[x_NX.stride().index(1)]


def _between_one_and(maximum: int, number: int) -> int:
    return max(1, min(number, maximum))


def embedding_product(
    ids_N: torch.Tensor,
    grad_NC: torch.Tensor,
    pattern: Pattern | AllScalars,
    transient_bytes: int = TRANSIENT_BYTES,
    padding_idx: int | None = None,
    by_frequency: bool = False,
) -> torch.Tensor:
    """The gradient of an embedding's weight at the positions of a pattern.

    It is the sum of `grad_NC` over the occurrences of each row. Only the rows in the batch are read.

    Args:
        ids_N: (N,), the rows that were looked up, not negative.
        grad_NC: (N, C), the gradient of the embeddings.
        pattern: the selected positions in the weight.
        transient_bytes: limit for temporary memory.
        padding_idx: a row without a gradient, as in F.embedding.
        by_frequency: divide the gradient of a row by its number of occurrences, as scale_grad_by_freq in F.embedding.

    Returns:
        (n,), in float32 or, if it is wider, in the dtype of `grad_NC`.
    """
    dtype = torch.promote_types(grad_NC.dtype, torch.float32)
    if isinstance(pattern, AllScalars):
        padding = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_dense_backward(
            grad_NC[:, : pattern.columns].to(dtype), ids_N, pattern.rows, padding, by_frequency
        ).flatten()
    starts, strip_columns, g = pattern.by_blocks
    result = torch.zeros(pattern.count, dtype=dtype, device=grad_NC.device)
    frequency = torch.bincount(ids_N) if by_frequency else None
    # A pair is an occurrence of a row and a selected position in this row
    pairs = max(1, transient_bytes // 2 // _BYTES_PER_PAIR)
    for token_slice in chunk_slices(ids_N.numel(), pairs):
        ids = ids_N[token_slice]
        block = torch.div(ids, g, rounding_mode="trunc")
        first = starts[block]
        counts = starts[block + 1] - first
        if padding_idx is not None:
            counts.masked_fill_(ids == padding_idx, 0)
        # The offset of the row's first scalar: a row has one scalar in each strip of its block
        begin = first.long() * g + (ids - block * g) * counts
        for rows in chunk_slices(ids.numel(), max(1, pairs // max(1, int(counts.max())))):
            inside = counts[rows]
            occurrence = torch.repeat_interleave(inside)
            ends = inside.cumsum(0)
            offset = torch.arange(occurrence.numel(), device=ids.device).sub_((ends - inside)[occurrence])
            column = strip_columns[first[rows][occurrence] + offset]
            values = grad_NC[token_slice][rows][occurrence, column].to(dtype)
            if frequency is not None:
                values /= frequency[ids[rows]][occurrence]
            result.index_add_(0, offset.add_(begin[rows][occurrence]), values)
    return result


_BYTES_PER_PAIR = 64
