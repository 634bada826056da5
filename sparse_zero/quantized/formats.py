"""Which modules are quantised, and by which format."""

from collections.abc import Iterator

import torch
from torch import nn

from sparse_zero.quantized.bits_and_bytes import EightBits, FourBits
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.quantized.torch_ao import Int8WeightOnly
from sparse_zero.zero.parameters import full_shape

FORMATS: tuple[type[QuantizedLayer], ...] = (FourBits, EightBits, Int8WeightOnly)


def quantized_layer(module: nn.Module) -> QuantizedLayer | None:
    """What is known of a quantised layer; None for any other module."""
    found = next((kind for kind in FORMATS if kind.matches(module)), None)
    return None if found is None else found(module)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantised layers of a model, by the names of their weights."""
    for path, module in model.named_modules():
        if (layer := quantized_layer(module)) is not None:
            yield f"{path}.{layer.name}".lstrip("."), layer


def weight_shape(module: nn.Module, name: str) -> torch.Size:
    """The shape of a module's parameter: that of the values if they are packed, and of the complete parameter if ZeRO
    stage 3 partitions it."""
    layer = quantized_layer(module) if name == "weight" else None
    if layer is not None:
        return layer.shape
    parameters = module._parameters  # a torch.jit script's are no dict
    return full_shape(dict.__getitem__(parameters, name) if isinstance(parameters, dict) else parameters[name])


def kinds(model: nn.Module) -> dict[str, str]:
    """`QuantizedLayer.kind` of each quantised weight, by its name."""
    return {name: layer.kind for name, layer in quantized_layers(model)}
