"""A merged model of a quantised base: plain layers with the dequantised weights and the deltas."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.quantized.formats import quantized_layer, quantized_layers
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.zero.parameters import is_partitioned

_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes that transformers sets on a quantised model."""


def check_dequantizable(model: nn.Module) -> None:
    """Raise UserError if ZeRO stage 3 partitions a quantised weight: each rank would get the complete plain model."""
    for name, layer in quantized_layers(model):
        if is_partitioned(dict.__getitem__(layer.module._parameters, layer.name)):
            raise UserError(
                f"{name} is quantised and partitioned by ZeRO stage 3: call save_adapter on all ranks, and merge "
                "the adapter in one process (sparse-zero merge)"
            )


@torch.no_grad()
def dequantize(model: nn.Module, deltas: Mapping[str, TrainedDelta]) -> None:
    """Replace each quantised layer by a plain one, in place and one at a time.

    The weights get the dtype of most of the model's other parameters, or bfloat16 if it has no others.

    Args:
        model: a plain model without wrappers.
        deltas: the selected weights by name. Those of quantised layers are added in float32.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if quantized_layer(module) is not None:
            paths.setdefault(id(module), []).append(path)
    if not paths:
        return
    dtype, left = _plain_dtype(model), dict(deltas)
    for names in list(paths.values()):
        module = model.get_submodule(names[0])
        delta = next((left.pop(key) for name in names if (key := f"{name}.{QuantizedLayer.name}") in left), None)
        layer = quantized_layer(module)
        values = layer.dequantized(torch.float32).to(dtype) if delta is None else delta.values_now(dtype)
        plain = layer.plain(values).requires_grad_(True)
        _move_hook(module, plain)
        for name in names:
            model.set_submodule(name, plain)
    _forget_quantization(model, dtype)


def _plain_dtype(model: nn.Module) -> torch.dtype:
    packed = {id(layer.module._parameters[layer.name]) for _, layer in quantized_layers(model)}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in packed:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.bfloat16


def _move_hook(old: nn.Module, new: nn.Module) -> None:
    """Move the hook by which Accelerate moves the inputs of a model on several devices."""
    if (hook := getattr(old, "_hf_hook", None)) is None:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(old)
    add_hook_to_module(new, hook)


def _forget_quantization(model: nn.Module, dtype: torch.dtype) -> None:
    """Remove what transformers notes of the quantisation, so that the model is saved and loaded as a plain one."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    for mark in _MARKS:
        vars(model).pop(mark, None)
    if (config := getattr(model, "config", None)) is not None:
        config.dtype = dtype
