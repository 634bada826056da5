"""The gradient of a weight at its selected positions only.

Shapes: N rows of a batch (examples x tokens), R x C the weight, n selected scalars.
    gradient of the weight = rows^T @ columns, with rows (N, R) and columns (N, C)
"""

import functools
import itertools
import math
import warnings

import torch

from sparse_zero.sampled_cost import kernel_is_cheaper

TRANSIENT_BYTES = 64 * 2**20
"""Bound on what a gradient allocates for a moment beyond its inputs and its result."""

SAMPLED_BELOW = 0.12
"""On CPU, the density under which the sampled product beats the dense one. Measured at 384 to 2048 square, float32,
two AVX-512 cores: equal at 10 to 15%, 5 times faster at 1%."""


def sampled_product(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, row_starts: torch.Tensor, column_index: torch.Tensor
) -> torch.Tensor:
    """(rows^T @ columns) at the positions of a CSR pattern, without ever holding the whole product.

    Args: row_starts: int32 (R + 1,), where each row's positions begin; column_index: int32 (n,), sorted in each row.
    Returns: (n,), float32 (the inputs' own dtype if that is wider, or on an accelerator that computes it densely).
    """
    n, (N, R), C = column_index.numel(), rows_NR.shape, columns_NC.shape[1]
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if N == 0 or n == 0:
        return rows_NR.new_zeros(n, dtype=dtype)
    if kernel_is_cheaper(rows_NR, columns_NC, n, TRANSIENT_BYTES):
        from sparse_zero.sampled_triton import sampled

        return sampled(rows_NR, columns_NC, row_starts, column_index, TRANSIENT_BYTES)
    if rows_NR.device.type == "cpu":
        # CPU half precision sums in half precision block by block; the sampled kernel does not take it at all.
        dtype = torch.promote_types(dtype, torch.float32)
        if n < SAMPLED_BELOW * R * C:
            return _sampled(rows_NR.to(dtype), columns_NC.to(dtype), row_starts, column_index)
    return _dense_in_chunks(rows_NR.to(dtype), columns_NC.to(dtype), row_starts, column_index)


def _sampled(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, row_starts: torch.Tensor, column_index: torch.Tensor
) -> torch.Tensor:
    _silence_beta_notice()
    values = rows_NR.new_zeros(column_index.numel())
    size = (rows_NR.shape[1], columns_NC.shape[1])
    pattern = torch.sparse_csr_tensor(row_starts, column_index, values, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows_NR.t(), columns_NC, beta=0.0).values()


@functools.cache
def _silence_beta_notice() -> None:
    """torch says once per process that CSR tensors are in beta; spend that once where nobody sees it."""
    with warnings.catch_warnings(action="ignore"):
        torch.eye(1).to_sparse_csr()


def _dense_in_chunks(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, row_starts: torch.Tensor, column_index: torch.Tensor
) -> torch.Tensor:
    """Dense products of some rows of the weight at a time, each read at its positions and dropped."""
    n, R, C = column_index.numel(), rows_NR.shape[1], columns_NC.shape[1]
    chunk = max(1, TRANSIENT_BYTES // (C * rows_NR.element_size()))
    if chunk >= R:
        return (rows_NR.t() @ columns_NC).view(-1)[flat_positions(row_starts, column_index, C)]
    result = rows_NR.new_empty(n)
    # One wait for the accelerator per weight, and only for weights larger than the bound.
    edges = row_starts[[min(i * chunk, R) for i in range(math.ceil(R / chunk) + 1)]].tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        first, last = i * chunk, min((i + 1) * chunk, R)
        block = rows_NR[:, first:last].t() @ columns_NC
        inside = flat_positions(row_starts[first : last + 1], column_index[start:stop], C)
        result[start:stop] = block.view(-1)[inside]
    return result


def embedding_product(
    ids_N: torch.Tensor, grad_NC: torch.Tensor, row_starts: torch.Tensor, column_index: torch.Tensor
) -> torch.Tensor:
    """The gradient of an embedding's weight at the positions of a CSR pattern: the sum of grad over the occurrences of
    each row. Touches the rows in the batch only.

    Args: ids_N: rows that were looked up; row_starts, column_index: as in `sampled_product`.
    Returns: (n,), float32 or wider.
    """
    dtype = torch.promote_types(grad_NC.dtype, torch.float32)
    result = torch.zeros(column_index.numel(), dtype=dtype, device=grad_NC.device)
    first, counts = row_starts[ids_N].long(), row_starts.diff()[ids_N].long()
    # For every pair of an occurrence and a position in its row: five indices, the last pieces among them, and a value.
    pairs = max(1, TRANSIENT_BYTES // (40 + dtype.itemsize + grad_NC.element_size()))
    widest = int(counts.max()) if counts.numel() else 0
    for rows in torch.arange(ids_N.numel(), device=ids_N.device).split(max(1, pairs // max(1, widest))):
        inside = counts[rows]
        occurrence = torch.repeat_interleave(rows, inside)
        offset = (
            torch.arange(occurrence.numel(), device=rows.device) - (inside.cumsum(0) - inside)[occurrence - rows[0]]
        )
        position = first[occurrence] + offset
        result.index_add_(0, position, grad_NC[occurrence, column_index[position].long()].to(dtype))
    return result


def flat_positions(row_starts: torch.Tensor, column_index: torch.Tensor, columns: int) -> torch.Tensor:
    """A CSR pattern as indices into the flattened matrix. Returns: int64 (n,)."""
    return _row_offsets(row_starts, column_index.numel(), columns).add_(column_index).long()


def csr_pattern(flat: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted indices into a flattened (rows, columns) matrix as (row_starts, column_index), both int32."""
    # Up to rows * columns, so that the last row ends too
    edges = torch.arange(0, rows * columns + 1, columns, device=flat.device)
    row_starts = torch.searchsorted(flat, edges).to(torch.int32)
    offsets = _row_offsets(row_starts, flat.numel(), columns)
    return row_starts, flat.to(offsets.dtype, copy=True).sub_(offsets).to(torch.int32)


def _row_offsets(row_starts: torch.Tensor, count: int, columns: int) -> torch.Tensor:
    """For each position, where its row starts in the flattened matrix. Returns: (count,), int32 where that is wide
    enough."""
    rows = row_starts.numel() - 1
    dtype = torch.int32 if rows * columns < 2**31 else torch.int64
    offsets = torch.arange(0, rows * columns, columns, dtype=dtype, device=row_starts.device)
    # output_size spares the accelerator a wait
    return torch.repeat_interleave(offsets, row_starts.diff(), output_size=count)
