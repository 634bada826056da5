"""Keeps DDP and DeepSpeed from sending packed weights from rank 0 to the others before the first step, where a weight
is a tensor subclass that cannot be sent. Every rank then has what it has loaded."""

from torch import nn

from sparse_zero.quantized.formats import quantized_layers

_OF_DDP = "_ddp_params_and_buffers_to_ignore"
_OF_DEEPSPEED = "ds_optim_param"
"""DeepSpeed's mark of parameters that differ between ranks. It has no other effect on frozen ones."""

_PREFIXES = ("", "base_model.model.")
"""Of the names within a PEFT model, which passes on the attributes of the model in it."""


def forbid(model: nn.Module) -> None:
    """Mark the weights. To be called again after each `_apply`, such as `model.to(...)`."""
    if names := _mark(model):
        ignored = vars(model).get(_OF_DDP, ())
        vars(model)[_OF_DDP] = [*ignored, *(name for name in names if name not in ignored)]


def allow(model: nn.Module) -> None:
    """Undo `forbid`."""
    names = _mark(model, False)
    if left := [name for name in vars(model).pop(_OF_DDP, ()) if name not in names]:
        vars(model)[_OF_DDP] = left


def _mark(model: nn.Module, wanted: bool = True) -> list[str]:
    """Set or remove the marks of DeepSpeed, and return the names of the weights."""
    found = [(name, layer) for name, layer in quantized_layers(model) if not layer.is_broadcast]
    for _, layer in found:
        parameter = dict.__getitem__(layer.module._parameters, layer.name)
        if wanted:
            setattr(parameter, _OF_DEEPSPEED, True)
        else:
            vars(parameter).pop(_OF_DEEPSPEED, None)
    return [prefix + name for name, _ in found for prefix in _PREFIXES]
