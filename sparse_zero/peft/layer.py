"""The part of a sparse model that PEFT and transformers look for: a tuner layer.

PEFT switches, disables, merges and deletes adapters layer by layer, in all `BaseTunerLayer`s of a model. A sparse
model keeps its own layers; it gets one tuner layer without parameters, which does these things for the whole model.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sparse_zero.adapters import switching
from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.save_and_load import extract_adapter, load_adapter, set_values
from sparse_zero.errors import UserError
from sparse_zero.model.activation import activate, deactivate
from sparse_zero.model.sparsify import merge_and_unload, unload
from sparse_zero.model.sparsity import Sparsity, state_of
from sparse_zero.model.wrappers import tensors_by_name, unwrap

NAME = "sparse_adapter"
"""The attribute of a model with its layer. PEFT skips modules whose names contain the prefix of a method."""


class SparseZeroLayer(nn.Module, BaseTunerLayer):
    """All adapters of a sparse model.

    Args:
        model: the model, without wrappers. It is not a submodule of the layer.
    """

    adapter_layer_names = ("deltas",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._owner = (model,)
        self.frozen: set[str] = set()
        """The adapters that do not require gradients."""

    def forward(self, *inputs: Any) -> Any:
        """The identity: an nn.Sequential calls all its submodules."""
        return inputs[0] if len(inputs) == 1 else inputs

    # What there is

    @property
    def model(self) -> nn.Module:
        return unwrap(self._owner[0])

    @property
    def state(self) -> Sparsity | None:
        """The state of the active adapter; None if there is none, or it is merged."""
        return state_of(self.model)

    @property
    def merged_state(self) -> Sparsity | None:
        return vars(self.model).get("merged_adapter")

    @property
    def inactive(self) -> dict[str, Adapter | Sparsity]:
        return vars(self.model).setdefault("inactive_adapters", {})

    @property
    def active_adapter(self) -> list[str]:
        state = self.state or self.merged_state
        return [] if state is None else [state.name]

    @property
    def merged_adapters(self) -> list[str]:
        return [] if self.merged_state is None else [self.merged_state.name]

    @property
    def disable_adapters(self) -> bool:
        return self.state is not None and bool(self.state.disabled)

    @property
    def deltas(self) -> nn.ModuleDict:
        """The trained parameters of each adapter that has them on the model's device. PEFT reads it."""
        states = [self.state or self.merged_state, *self.inactive.values()]
        groups = nn.ModuleDict()
        for state in states:
            if isinstance(state, Sparsity) and "." not in state.name:
                groups[state.name] = nn.ParameterList(weight.delta for weight in state.weights.values())
        return groups

    def _get_available_adapters(self) -> set[str]:
        return {*self.active_adapter, *self.inactive}

    # What PEFT does with it

    def add(self, adapter_name: str, create: Callable[[nn.Module], None]) -> None:
        """Add an adapter, which becomes the active one if there is no other.

        Args:
            create: makes a plain model sparse.
        """
        self.check_not_merged()
        active = self.state
        if active is None:
            create(self.model)
            self.state.name = adapter_name
            return
        disabled = active.disabled
        deactivate(self.model)
        try:
            create(self.model)
            created = self.state
            created.name = adapter_name
            deactivate(self.model)
            self.inactive[adapter_name] = created
        finally:
            if self.state is not None:
                deactivate(self.model)
            activate(self.model, active, disabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) != 1:
            raise UserError(
                f"set_adapter: {len(names)} adapters; a sparse model has one active adapter: combine_adapters makes "
                "one of several"
            )
        if self.merged_state is not None:
            warnings.warn(f"'{self.merged_state.name}' was merged: it is unmerged", stacklevel=2)
            self.unmerge()
        if self.state is None and self.inactive:
            raise UserError("the model was merged or unloaded outside of PEFT: load the adapter again")
        switching.set_adapter(self.model, names[0])
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if requires_grad:
            self.frozen -= {*names}
        else:
            self.frozen |= {*names}
        self.apply_requires_grad()

    def apply_requires_grad(self) -> None:
        """Let the trained parameters of the active adapter require gradients, unless it is frozen."""
        for state in (self.state, *self.inactive.values()):
            for weight in state.weights.values() if isinstance(state, Sparsity) else ():
                weight.delta.requires_grad_(state.name not in self.frozen)
        if self.state is None or not self.state.whole:
            return
        wanted, tensors = self.state.name not in self.frozen, tensors_by_name(self.model)
        if self.state.disabled:
            self.state.frozen = list(self.state.whole) if wanted else []
            return
        for name in self.state.whole:
            tensors[name].requires_grad_(wanted)

    def enable_adapters(self, enabled: bool) -> None:
        if self.merged_state is not None and not enabled:
            self.unmerge()
        state = self.state
        if state is None or enabled == (not state.disabled):
            return
        if enabled:
            while state.disabled:
                state.enable(self.model)
        else:
            state.disable(self.model)
        self.apply_requires_grad()

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        if self.merged_state is not None:
            warnings.warn(f"'{self.merged_state.name}' is merged already", stacklevel=2)
            return
        if adapter_names is not None and [*adapter_names] != self.active_adapter:
            raise UserError(
                f"merge_adapter: {', '.join(adapter_names) or 'nothing'}, but only the active adapter can be merged: "
                "first call set_adapter; combine_adapters makes one of several"
            )
        switching.merge_adapter(self.model)

    def unmerge(self) -> None:
        if self.merged_state is None:
            warnings.warn("no adapter is merged", stacklevel=2)
            return
        switching.unmerge_adapter(self.model)
        self.apply_requires_grad()

    def delete_adapter(self, adapter_name: str) -> None:
        self.frozen.discard(adapter_name)
        if self.inactive.pop(adapter_name, None) is not None or adapter_name not in self.active_adapter:
            return
        self.check_not_merged()
        if not self.inactive:
            unload(self.model)
            return
        next_one = next(iter(sorted(self.inactive)))
        warnings.warn(f"'{adapter_name}' was active and is deleted: '{next_one}' is active now", stacklevel=2)
        self.set_adapter(next_one)
        del self.inactive[adapter_name]

    def unload_model(self, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """Make a plain model: with the values of the active adapter, or of the named one, or with the original ones.

        Raises:
            UserError: several names, an unknown one, or a value that is NaN or infinite. The model is then unchanged.
        """
        model = self.model
        if adapter_names is not None and merge:
            if self.merged_state is not None and [*adapter_names] != self.merged_adapters:
                self.unmerge()
            if self.merged_state is None:
                self.set_adapter(adapter_names)
        if self.merged_state is not None:
            self.unmerge()
        if self.state is not None:
            merge_and_unload(model) if merge else unload(model)
        delattr(model, NAME)
        return model

    # Values

    def extract(self, adapter_name: str, keep: bool, state_dict: Mapping[str, torch.Tensor] | None = None) -> Adapter:
        """A copy of an adapter in CPU memory. See `extract_adapter`."""
        if adapter_name in self.inactive:
            state = self.inactive[adapter_name]
            if isinstance(state, Adapter):
                return state
            return extract_adapter(self.model, keep, sparsity=state)
        return extract_adapter(self.model, keep, state_dict, self.state or self.merged_state)

    def load(self, adapter_name: str, directory: str) -> None:
        """Load an adapter of this name, or its values if there is one with the same selection."""
        self.check_not_merged()
        if adapter_name not in self.inactive:
            load_adapter(self.model, directory, adapter_name)
        else:
            with self.temporarily_active(adapter_name):
                load_adapter(self.model, directory, adapter_name)
        self.apply_requires_grad()

    def set_values(self, adapter_name: str, adapter: Adapter) -> None:
        """Set the values of an adapter to those of another one with the same selection."""
        self.check_not_merged()
        if isinstance(self.inactive.get(adapter_name), Adapter):
            self.inactive[adapter_name] = adapter.clone()
        elif adapter_name in self.inactive:
            with self.temporarily_active(adapter_name):
                set_values(self.model, adapter, list(self.state.weights))
        else:
            set_values(self.model, adapter, list(self.state.weights))

    @contextlib.contextmanager
    def temporarily_active(self, adapter_name: str) -> Iterator[None]:
        """A context in which another adapter is the active one."""
        before = self.state.name
        switching.set_adapter(self.model, adapter_name)
        try:
            yield
        finally:
            switching.set_adapter(self.model, before)

    def check_not_merged(self) -> None:
        """Raise UserError if an adapter is merged."""
        if self.merged_state is not None:
            raise UserError(f"'{self.merged_state.name}' is merged: first call unmerge_adapter()")


def layer_of(model: nn.Module) -> SparseZeroLayer | None:
    """The layer of a model, which may be wrapped; None if it has none."""
    return next((module for module in model.modules() if isinstance(module, SparseZeroLayer)), None)
