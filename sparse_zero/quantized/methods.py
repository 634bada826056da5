"""What a model was quantised by, as its config says, and its modules with packed weights of formats unknown here."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparse_zero.quantized.formats import quantized_layer

BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"

_PACKED_DTYPES = {
    *(torch.int8, torch.uint8, torch.int16, torch.int32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
}

_OF_PLAIN_MODELS = ("torch.", "transformers.models.", "transformers_modules.")
"""The modules of these have integers that are no weights, such as masks."""


def own_quantization(config: Any) -> Any:
    """How a checkpoint or model is quantised, as its config says: a mapping or an object of transformers. None: it is
    not."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    # A GGUF file is dequantised when it is read
    return None if found is None or method_of(found) == "gguf" else found


def method_of(given: Any) -> str:
    """The method of a `quantization_config`, such as gptq."""
    settings = given if isinstance(given, Mapping) else vars(given)
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return BITSANDBYTES
    return str(getattr(method, "value", method) or "an unknown method")


def described_method(given: Any) -> str:
    """The method for a message, with the configuration of torchao: `torchao (Int4WeightOnlyConfig)`."""
    kind, _ = torchao_settings(given) if method_of(given) == TORCHAO else (None, {})
    return f"{TORCHAO} ({kind})" if kind else method_of(given)


def torchao_settings(given: Any) -> tuple[str | None, Mapping[str, Any]]:
    """The class of torchao's configuration in a `quantization_config`, and its fields.

    Args: given: a mapping, which needs no torchao, or an object of transformers.
    """
    settings = given if isinstance(given, Mapping) else given.to_dict()
    entry = settings.get("quant_type")
    entry = entry.get("default") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping):
        return None, {}
    return entry.get("_type"), entry.get("_data") or {}


def packed_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, method) of each module that keeps a matrix of integers or of float8 in place of a linear layer's weight,
    and is not a `QuantizedLayer`.

    An nn.Linear with a weight is not among them, whatever its weight is.
    """
    own = own_quantization(getattr(model, "config", None))
    method = None if own is None else method_of(own)
    for name, module in model.named_modules():
        if _is_packed(module):
            yield name, method or type(module).__name__


def _is_packed(module: nn.Module) -> bool:
    if quantized_layer(module) is not None:
        return False
    if isinstance(module, nn.Linear):
        # compressed-tensors replaces the weight of an ordinary layer by other parameters
        if dict.__contains__(module._parameters, "weight"):
            return False
    elif type(module).__module__.startswith(_OF_PLAIN_MODELS):
        return False
    tensors = [*dict.values(module._parameters), *module._buffers.values()]
    return any(t is not None and t.dtype in _PACKED_DTYPES and t.dim() > 1 for t in tensors)
