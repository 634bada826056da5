"""What is kept of a layer's input for the gradient of the delta: all of it, or its drawn columns.

It is kept in the dtype in which it is used: under autocast in that of the output. Layers with the same input share it.
"""

import threading
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef


class Key(NamedTuple):
    """What columns are kept: inputs of equal keys are kept once."""

    columns: Any
    """A hashable that is equal for equal columns."""
    dim: int
    """The dimension of the input."""


class _Last(threading.local):
    """The last input of which columns were kept in this thread. It keeps nothing alive."""

    state: tuple | None = None
    storage: StorageWeakRef | None = None
    kept: TensorWeakRef | None = None


_last = _Last()


def kept_input(inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The input to save for a product's backward. Under autocast it is saved in the lower precision of the output."""
    if not inputs.is_floating_point() or inputs.element_size() <= output.element_size():
        return inputs
    if inputs.is_leaf:  # not cached: an optimizer may change it without a new version
        return inputs.detach().to(output.dtype)
    # Cached on the tensor: layers with the same input share one copy
    state, kept = getattr(inputs, "_sparse_zero_kept", (None, None))
    if state != (inputs._version, output.dtype):
        state, kept = (inputs._version, output.dtype), inputs.detach().to(output.dtype)
        inputs._sparse_zero_kept = state, kept
    return kept


def kept_columns(inputs: torch.Tensor, output: torch.Tensor, columns: torch.Tensor, key: Key) -> torch.Tensor:
    """`kept_input` at some columns only.

    Args:
        inputs: (..., width), or another dimension `key.dim` of this size.
        columns: int64 (K,)
        key: equal for equal columns.

    Returns: (..., K)
    """
    if inputs.is_leaf or inputs.is_inference():
        return _gather(inputs, output, columns, key.dim)
    # By the memory: ZeRO stage 3 gives each layer another tensor that shows it
    dtype, storage = _narrower(inputs, output), StorageWeakRef(inputs.untyped_storage())
    state = key, dtype, inputs._version, inputs.storage_offset(), inputs.shape, inputs.stride()
    kept = _last.kept() if _last.kept and _last.state == state and _last.storage == storage else None
    if kept is None:
        kept = _gather(inputs, output, columns, key.dim)
        _last.state, _last.storage, _last.kept = state, storage, TensorWeakRef(kept)
    return kept


@torch.no_grad()
def _gather(inputs: torch.Tensor, output: torch.Tensor, columns: torch.Tensor, dim: int) -> torch.Tensor:
    dtype = _narrower(inputs, output)
    if dim in (-1, inputs.dim() - 1) and inputs.is_contiguous():  # in two dimensions it takes a quarter of the time
        lines = inputs.view(inputs.shape[:-1].numel(), inputs.shape[-1])
        kept = lines.index_select(1, columns).view(*inputs.shape[:-1], columns.numel())
    else:
        kept = inputs.index_select(dim, columns)
    return kept.to(dtype)


def _narrower(inputs: torch.Tensor, output: torch.Tensor) -> torch.dtype:
    return output.dtype if inputs.element_size() > output.element_size() else inputs.dtype
