"""A merged model of a quantised base that stays quantised."""

import torch
from torch import nn

from sparse_zero.model.activation import merge
from sparse_zero.model.dequantize import check_dequantizable
from sparse_zero.model.sparsify import forget_adapters
from sparse_zero.model.wrappers import unwrap
from sparse_zero.quantized.layer import QuantizedLayer


@torch.no_grad()
def merge_and_quantize(model: nn.Module, force: bool = False) -> nn.Module:
    """As `merge_and_unload`, but the base model stays quantised: the layers with deltas are quantised again, with the
    settings that they had, and the others keep their packed weights bit for bit.

    Args and Raises: as of `merge_and_unload`.
    """
    model = unwrap(model)
    check_dequantizable(model)
    for name, delta in merge(model, force).weights.items():
        if delta.is_packed:
            path = name.removesuffix(f".{QuantizedLayer.name}")
            model.set_submodule(path, delta.layer.quantize(delta.values_now(torch.float32)))
    return forget_adapters(model)
