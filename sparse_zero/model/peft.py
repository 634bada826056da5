"""Adapters that PEFT adds to a sparse model. They are known by the names of their classes: PEFT is not imported."""

from typing import Any

from torch import nn

OURS = "SPARSE_ZERO"
"""The name that `sparse_zero.peft` registers with PEFT."""


def other_methods(peft_config: Any) -> list[str]:
    """The names of the PEFT methods other than ours in the `peft_config` that PEFT sets on a model."""
    configs = peft_config.values() if isinstance(peft_config, dict) else ()
    kinds = {getattr(config, "peft_type", None) for config in configs} - {None, OURS}
    return sorted(getattr(kind, "value", str(kind)) for kind in kinds)


def remove_adapter(model: nn.Module) -> None:
    """Put the layers back that PEFT has wrapped, in place."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kinds = {kind.__name__ for kind in type(module).__mro__}
        attribute = "base_layer" if "BaseTunerLayer" in kinds else "original_module"
        inner = module._modules.get(attribute)
        if inner is None or not kinds & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, inner)
    vars(model).pop("_hf_peft_config_loaded", None)
