"""Adapters that PEFT adds to a sparse model. They are known by the names of their classes: PEFT is not imported."""

from typing import Any

from torch import nn

OURS = "SPARSE_ZERO"
"""The name that `sparse_zero.peft` registers with PEFT."""

_INNER = {"AuxiliaryTrainingWrapper": "original_module", "BaseTunerLayer": "base_layer"}
"""The attribute with the layer that PEFT has wrapped, by a base class of the wrapper."""


def other_methods(peft_config: Any) -> list[str]:
    """The names of the PEFT methods other than ours in the `peft_config` that PEFT sets on a model."""
    configs = peft_config.values() if isinstance(peft_config, dict) else ()
    kinds = {getattr(config, "peft_type", None) for config in configs} - {None, OURS}
    return sorted(getattr(kind, "value", str(kind)) for kind in kinds)


def remove_adapter(model: nn.Module) -> None:
    """Put the layers back that PEFT has wrapped, in place."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kinds = {kind.__name__ for kind in type(module).__mro__}
        attribute = next((inner for kind, inner in _INNER.items() if kind in kinds), None)
        parent_name, _, child = name.rpartition(".")
        if attribute is None or not _has(model, parent_name, child, module):
            continue
        setattr(model.get_submodule(parent_name), child, getattr(module, attribute))
    vars(model).pop("_hf_peft_config_loaded", None)


def _has(model: nn.Module, parent_name: str, child: str, module: nn.Module) -> bool:
    """Whether a module is still there, after those that contain it were put back."""
    try:
        return model.get_submodule(parent_name)._modules.get(child) is module
    except AttributeError:
        return False
