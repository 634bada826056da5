"""Packed weights that are subclasses of a tensor, as torchao's: what others do with the parameters of a model does not
work with them.

- DDP and DeepSpeed send all parameters from rank 0 to the others before the first step. These cannot be sent: every
  rank has what it has loaded.
- `Module.to` exchanges the contents of a parameter, which torch refuses if there is a weak reference to it. DeepSpeed
  has one to each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.quantized.layer import QuantizedLayer

_OF_DDP = "_ddp_params_and_buffers_to_ignore"
_OF_DEEPSPEED = "ds_optim_param"
"""DeepSpeed's mark of parameters that differ between ranks. It has no other effect on frozen ones."""

_PREFIXES = ("", "base_model.model.")
"""Of the names within a PEFT model, which passes on the attributes of the model in it."""


def leave_out(model: nn.Module) -> None:
    """Keep DDP and DeepSpeed from sending the weights."""
    names = []
    for name, layer in _layers(model):
        setattr(_parameter(layer), _OF_DEEPSPEED, True)
        names += [prefix + name for prefix in _PREFIXES]
    if names:
        ignored = vars(model).get(_OF_DDP, ())
        vars(model)[_OF_DDP] = list(dict.fromkeys((*ignored, *names)))


def take_in(model: nn.Module) -> None:
    """Undo `leave_out`."""
    names = set()
    for name, layer in _layers(model):
        vars(_parameter(layer)).pop(_OF_DEEPSPEED, None)
        names |= {prefix + name for prefix in _PREFIXES}
    if left := [name for name in vars(model).pop(_OF_DDP, ()) if name not in names]:
        vars(model)[_OF_DDP] = left


def prepare_plain(model: nn.Module) -> None:
    """Do for a model that is not sparse what sparse models do: see `leave_out` and `applied`."""
    if next(_layers(model), None) is not None:
        leave_out(model)
        vars(model)["_apply"] = MethodType(_apply_to_packed, model)


def _apply_to_packed(
    model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
) -> nn.Module:
    with applied(model, function):
        return type(model)._apply(model, function, *args, **kwargs)


@contextmanager
def applied(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """A context in which `Module._apply` leaves the weights alone. They then become what the function returns."""
    layers = list(_layers(model))
    before = [_parameter(layer) for _, layer in layers]
    for _, layer in layers:
        layer.module._parameters[layer.name] = None
    after = before
    try:
        yield
        after = _applied(before, function)
    finally:
        for (_, layer), parameter in zip(layers, after, strict=True):
            layer.module._parameters[layer.name] = parameter
    leave_out(model)


@torch.no_grad()
def _applied(parameters: list[nn.Parameter], function: Callable[[torch.Tensor], torch.Tensor]) -> list[nn.Parameter]:
    made: dict[int, nn.Parameter] = {}
    for parameter in parameters:
        if id(parameter) not in made:
            result = function(parameter)
            made[id(parameter)] = parameter if result is parameter else nn.Parameter(result, parameter.requires_grad)
    return [made[id(parameter)] for parameter in parameters]


def _layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    return ((name, layer) for name, layer in quantized_layers(model) if layer.is_subclassed)


def _parameter(layer: QuantizedLayer) -> nn.Parameter:
    return dict.__getitem__(layer.module._parameters, layer.name)
