"""The mixin of all modules with selected parameters: reading, saving and replacing these parameters."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import reads, state_dict
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.refusals import refuse_replacement
from sparse_zero.model.saved_weights import saved_by_reference
from sparse_zero.zero.parameters import is_partitioned, is_whole


class SparseModule:
    """A mixin for modules with selected parameters. Each of these parameters is read through a property."""

    plain_class: ClassVar[type[nn.Module]]
    """The original class of the module."""
    selected_names: ClassVar[frozenset[str]]
    """Names of the selected parameters within the module."""
    sparse_weights: dict[str, TrainedDelta]
    """The selected parameters by these names."""
    delta_names: dict[str, str]
    """The attributes of the module with their deltas."""
    owner_indices: dict[str, int]
    """The index of this module among the owners of each."""
    new: ClassVar[Callable[[type[nn.Module], frozenset[str]], nn.Module]]
    """Makes an empty module of this class from `plain_class` and `selected_names`, which unpickling fills."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_traced = torch.compiler.is_compiling() and not any(map(is_partitioned, self._selected()))
        if is_traced or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        weights = [weight for weight in self.sparse_weights.values() if not weight.is_packed]
        if len(weights) == 1 and weights[0] in reads.here.plain and is_whole(weights[0].weight):
            with saved_by_reference(weights):
                return super().forward(*args, **kwargs)
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(reads.shared(weight))
            stack.enter_context(saved_by_reference(weight for weight in weights if is_whole(weight.weight)))
            return super().forward(*args, **kwargs)

    def _selected(self) -> list[nn.Parameter]:
        return [self._parameters[name] for name in self.sparse_weights]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.selected_names and isinstance(value, nn.Parameter):
            self.sparse_weights[name].replace(value)
        else:
            super().__setattr__(name, value)

    @property
    def parametrizations(self) -> nn.ModuleDict:
        """What torch.nn.utils.parametrize looks at before it parametrizes one of the module's parameters."""
        return self._modules.get("parametrizations") or _Unparametrized(self.sparse_weights)

    def __delattr__(self, name: str) -> None:
        if name in self.selected_names:
            refuse_replacement(self.sparse_weights[name].selection.name)
        super().__delattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        state_dict.refresh(self.sparse_weights)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state_dict.add_checksums(self.sparse_weights, destination, prefix)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict, *others: Any) -> None:
        with state_dict.loading(self, state, prefix, *others) as is_right:
            if is_right:
                super()._load_from_state_dict(state, prefix, metadata, *others)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        result = super()._apply(*args, **kwargs)
        for weight in self.sparse_weights.values():
            weight.share_columns()
        return result

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise UserError(
            "nn.DataParallel cannot run a sparse model: use DistributedDataParallel, with a process for each GPU "
            "(torchrun, `sparse-zero train`), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.new, (self.plain_class, self.selected_names), self.__getstate__()


class _Unparametrized(nn.ModuleDict):
    """No parametrizations, and none can be added to a sparse weight."""

    def __init__(self, weights: dict[str, TrainedDelta]) -> None:
        super().__init__()
        self.__dict__["weights"] = weights

    def __contains__(self, name: str) -> bool:
        if name in self.weights:
            refuse_replacement(self.weights[name].selection.name)
        return False
