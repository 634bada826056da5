"""Finds the model inside the wrappers that libraries put around it.

A wrapper is known by the names of its classes and of its attributes, so that none of these libraries is imported. A
model that is compiled in place (`model.compile()`) has no wrapper. Accelerate uses the wrappers below.
"""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.selection.input_columns import LAYER_WRAPPERS

_ATTRIBUTES = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DeepSpeedEngine": "module",  # the base class of DeepSpeed's engines for training
    "InferenceEngine": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "_FabricModule": "_forward_module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # what a PeftModel has as its base model, e.g. LoraModel
}
"""The attribute that contains the wrapped module, by the name of the wrapper's class or of a base class."""

_SYNCHRONIZES = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Wrappers that collect the trained parameters when they are created."""

STATE = "_sparse_zero_state"
"""The attribute of a sparse model with its `Sparsity`."""

_MARKS = (STATE, "merged_adapter", "inactive_adapters")
"""Attributes of models that are or were sparse."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers. Names of parameters are those of this model.

    A module of an unknown class that has the sparse model as its attribute `module` counts as a wrapper, too. A sparse
    model is never unwrapped, whatever it contains.
    """
    *_, inner = _layers(model)
    return inner


def unwrap_for(model: nn.Module, names: Collection[str]) -> nn.Module:
    """`unwrap` for a model that is not sparse, of which only the names of some parameters are known.

    A module of an unknown class that has a module with these parameters as its attribute `module` counts as a wrapper.
    """
    inner = unwrap(model)
    fitting = (module for module in _chain_of_modules(inner) if {*names} <= dict(module.named_parameters()).keys())
    return next(fitting, inner)


def tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model by their names without the wrappers of single layers.

    A layer may be compiled, or wrapped by PEFT or for activation checkpointing, after the model became sparse.
    """
    return {
        ".".join(part for part in name.split(".") if part not in LAYER_WRAPPERS): tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def check_wrappers(model: nn.Module) -> None:
    """Raise UserError if a wrapper has collected the parameters that it trains, or saves only its own: it would not
    see the deltas."""
    for layer in _layers(model):
        if {"PeftModel", "PeftMixedModel"} & {*_class_names(layer)}:
            raise UserError(
                f"the model is a {type(layer).__name__}, whose save_pretrained would leave out the deltas: call "
                "merge_and_unload() of it first, or get_peft_model(base_model, sparse_zero.peft.SparseZeroConfig(...))"
            )
        if found := next((name for name in _class_names(layer) if name in _SYNCHRONIZES), None):
            raise UserError(
                f"the model is wrapped in {found}, which does not see parameters that are added now: call sparsify "
                "before you wrap the model"
            )


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside to the inside."""
    while model is not None:
        yield model
        model = _wrapped_by(model)


def _wrapped_by(model: nn.Module) -> nn.Module | None:
    if _is_marked(model):
        return None
    attribute = next((_ATTRIBUTES[name] for name in _class_names(model) if name in _ATTRIBUTES), None)
    if attribute is not None:
        return _child(model, attribute)
    inner = _child(model, "module")
    return inner if any(_is_marked(module) for module in _chain_of_modules(inner)) else None


def _chain_of_modules(module: nn.Module | None) -> Iterator[nn.Module]:
    while module is not None:
        yield module
        attribute = next((_ATTRIBUTES[name] for name in _class_names(module) if name in _ATTRIBUTES), "module")
        module = _child(module, attribute)


def _child(model: nn.Module, name: str) -> nn.Module | None:
    # Not getattr: wrappers forward the access to attributes to what they wrap
    return dict(model.named_children()).get(name)


def _is_marked(model: nn.Module) -> bool:
    # Not hasattr: DeepSpeed's engine forwards attribute access to its module
    return any(mark in vars(model) for mark in _MARKS)


def _class_names(model: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]
