"""Tiny models that are loaded quantised, and the dense model of their dequantised weights."""

import logging
from pathlib import Path

import torch
from families import tiny
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, dict] = {
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
"""Arguments of BitsAndBytesConfig."""

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
    config = BitsAndBytesConfig(**KINDS[kind] | changes)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype).train()


def dequantized_by_bitsandbytes(module: nn.Module) -> torch.Tensor:
    """The values of a quantised layer in float32, by bitsandbytes' own functions."""
    from bitsandbytes.functional import dequantize_4bit

    weight = module._parameters["weight"]
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
            if type(module).__name__.startswith("Linear") and type(module) is not nn.Linear:
                dense.get_submodule(name).weight.copy_(dequantized_by_bitsandbytes(module))
    return dense


def batch(rows: int = 2, tokens: int = 6, vocabulary: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}
