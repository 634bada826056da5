"""Tiny models that are loaded quantised, and the dense model of their dequantised weights."""

import logging
from pathlib import Path

import torch
from families import tiny
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, dict] = {
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
    "int8_weight_only": {},
    "int8_weight_only-16": {"group_size": 16},
}
"""Arguments of BitsAndBytesConfig, or of torchao's PerGroup."""

SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 48, "tie_word_embeddings": False}


def save_base(directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: object) -> Path:
    """A random model whose layers matter: initial weights of transformers are so small that all logits are alike."""
    model = tiny(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.to(dtype).save_pretrained(directory)
    return directory


def load(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """The model of a directory, quantised, in training mode."""
    config = config_of(kind, **changes)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype).train()


def config_of(kind: str, **changes: object) -> BitsAndBytesConfig | TorchAoConfig:
    if not kind.startswith("int8_weight_only"):
        return BitsAndBytesConfig(**KINDS[kind] | changes)
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

    granularity = PerGroup(**KINDS[kind]) if KINDS[kind] else PerRow()
    return TorchAoConfig(Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))


def is_quantized(module: nn.Module) -> bool:
    """Without the code that is tested."""
    weight = module._parameters.get("weight")
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") or type(weight).__name__ == "Int8Tensor"


def dequantized_by_its_library(module: nn.Module) -> torch.Tensor:
    """The values of a quantised layer in float32, by bitsandbytes' own functions, and by hand for torchao."""
    from bitsandbytes.functional import dequantize_4bit

    weight = module._parameters["weight"]
    if type(weight).__name__ == "Int8Tensor":
        rows, groups = weight.scale.shape
        return (weight.qdata.float().view(rows, groups, -1) * weight.scale[..., None]).view(rows, -1)
    if (state := getattr(weight, "quant_state", None)) is not None:
        assert state.dtype == torch.float32, "else it is rounded"
        return dequantize_4bit(weight.data, state)
    scales = weight.SCB if module.state.SCB is None else module.state.SCB
    return weight.data.float() * scales[:, None] / 127


def dense_like(directory: Path, quantized: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model whose weights are the dequantised ones of another."""
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if is_quantized(module):
                dense.get_submodule(name).weight.copy_(dequantized_by_its_library(module))
    return dense


def batch(rows: int = 2, tokens: int = 6, vocabulary: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}
