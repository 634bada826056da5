"""What autograd saves of a selected weight for backward: a reference, and what the forward has seen in the weight.

A forward saves the weight to compute the gradient of its input. Before the backward it may have changed: another
forward ran with the adapter disabled, as in DPO, or with another scale, or ZeRO stage 3 has freed the gathered copy.
Then the values that the forward has seen are put back.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sparse_zero.model.refusals import refuse_second_derivatives
from sparse_zero.model.row_range import SelectedWeight

_Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


class saved_by_reference(torch.autograd.graph.saved_tensors_hooks):
    """A context in which autograd saves references to the given weights instead of tensors that show them.

    All other tensors go to the hooks that were active before: those of gradient checkpointing or of activation
    offloading, which torch would not call for tensors that are saved in this context.
    """

    def __init__(self, weights: Iterable[SelectedWeight]) -> None:
        weights = list(weights)
        outer: _Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)

        def pack(tensor: torch.Tensor) -> Any:
            for weight in weights:
                if (offset := _offset_in(weight.weight, tensor)) is not None:
                    return _Reference(weight, tensor, offset)
            return tensor if outer is None else _Outer(outer[0](tensor))

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, _Reference):
                return packed.tensor()
            return outer[1](packed.packed) if isinstance(packed, _Outer) else packed

        super().__init__(pack, unpack)


class _Outer:
    """What the hooks outside have made of a tensor."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed


class _Reference:
    """A tensor that shows a weight, or a part of it, as a forward has seen it."""

    def __init__(self, weight: SelectedWeight, tensor: torch.Tensor, offset: int) -> None:
        self._weight, self._seen, self._trains = weight, weight.seen, weight.trains
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), offset

    def tensor(self) -> torch.Tensor:
        if self._trains:
            refuse_second_derivatives(self._weight.selection.name)
        self._weight.restore(self._seen)
        values = self._weight.weight.data
        return values.as_strided(self._size, self._stride, values.storage_offset() + self._offset)


def _offset_in(weight: torch.Tensor, tensor: torch.Tensor) -> int | None:
    """The offset of a view of `weight` within it, in scalars. None if `tensor` is not such a view."""
    if tensor.layout != torch.strided or tensor.dtype != weight.dtype or not tensor.numel():
        return None
    if tensor.device != weight.device:
        return None
    offset = (tensor.data_ptr() - weight.data_ptr()) // weight.element_size()
    # Storages are not compared: one storage may contain several gathered parameters
    return offset if 0 <= offset < weight.numel() else None
