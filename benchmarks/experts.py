"""Experts as targets: time and memory of a step, compared with forward and backward of the frozen model.

    python benchmarks/experts.py                                  16 experts, 4 layers, float32, 1% of the experts
    python benchmarks/experts.py --dtype bfloat16 --experts 64 --json experts.json

A random model in Qwen2-MoE's shape; `eager` reads its experts one by one, `grouped_mm` is transformers' default.
    frozen   the floor: the gradient passes through every layer to the input embeddings; no optimizer
    sparse   the sampled gradient, AdamW, and writing the deltas
    dense    the same, but temporarily with the dense gradient of all experts, as for layers without a sampled gradient
Methods take turns in one process. Memory is the peak of a step beyond what is allocated between steps.
"""

import argparse
import contextlib
import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from allocations import Meter
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from turns import in_turns, ratio

from sparse_zero import SparseConfig, sparsify
from sparse_zero.model import weight_tensor
from sparse_zero.training.device import device_name

Step = Callable[[torch.Tensor], None]
METHODS = ("frozen", "sparse", "dense")
VOCABULARY = 1024


def mixture(arguments: argparse.Namespace, implementation: str) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=arguments.hidden,
        moe_intermediate_size=2 * arguments.hidden,
        shared_expert_intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=arguments.experts,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    model = Qwen2MoeForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype)).train()
    model.set_experts_implementation(implementation)
    return model


def frozen(model: nn.Module) -> Step:
    model.requires_grad_(False)

    def step(ids: torch.Tensor) -> None:
        embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
        model(inputs_embeds=embeddings, labels=ids).loss.backward()

    return step


def trained(model: nn.Module, arguments: argparse.Namespace, rules: contextlib.AbstractContextManager) -> Step:
    experts = sum(p.numel() for name, p in model.named_parameters() if "mlp.experts" in name)
    density = arguments.density * experts / sum(p.numel() for p in model.parameters())
    sparsify(model, SparseConfig(density=density, targets=["mlp.experts"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(ids: torch.Tensor) -> None:
        with rules:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(arguments: argparse.Namespace, implementation: str) -> dict[str, Step]:
    model = mixture(arguments, implementation)
    return {
        "sparse": trained(copy.deepcopy(model), arguments, contextlib.nullcontext()),
        "dense": trained(copy.deepcopy(model), arguments, mock.patch.dict(weight_tensor.RULES, clear=True)),
        "frozen": frozen(model),
    }


def measure(arguments: argparse.Namespace, implementation: str) -> list[dict]:
    methods = steps(arguments, implementation)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (1, arguments.tokens), generator=generator).to(arguments.device)
    seconds = in_turns(
        {name: partial(step, ids) for name, step in methods.items()}, arguments.rounds, arguments.device
    )
    peaks = {name: peak_bytes(step, ids) for name, step in methods.items()}
    return [
        {
            "experts": implementation,
            "method": name,
            "seconds": round(statistics.median(seconds[name]), 4),
            "ratio_to_frozen": round(ratio(seconds[name], seconds["frozen"])["median"], 3),
            "peak_mib": round(peaks[name] / 2**20, 1),
            "beyond_frozen_mib": round((peaks[name] - peaks["frozen"]) / 2**20, 1),
        }
        for name in METHODS
    ]


def peak_bytes(step: Step, ids: torch.Tensor) -> int:
    """The peak of the bytes that torch's allocator has allocated during a step, beyond those before the step."""
    if ids.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(ids)
        return torch.cuda.max_memory_allocated() - before
    with Meter() as meter:
        step(ids)
    return meter.whole.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--density", type=float, default=0.01, help="fraction of the experts' scalars")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = [row for name in arguments.implementations for row in measure(arguments, name)]
    all_experts = arguments.experts * 4 * arguments.hidden**2 * getattr(torch, arguments.dtype).itemsize
    print(
        f"{device_name()}, {arguments.dtype}, {arguments.tokens} tokens, {arguments.layers} layers of "
        f"{arguments.experts} experts (gate_up_proj: {all_experts / 2**20:.0f} MiB), {arguments.density:.2%} of them"
    )
    print(f"{'experts':<11} {'method':<7} {'s / step':>9} {'/ frozen':>9} {'peak':>12} {'beyond frozen':>14}")
    for row in rows:
        print(
            f"{row['experts']:<11} {row['method']:<7} {row['seconds']:>9.3f} {row['ratio_to_frozen']:>9.3f} "
            f"{row['peak_mib']:>8.1f} MiB {row['beyond_frozen_mib']:>10.1f} MiB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
