"""Time of a training step against the frozen model's own forward and backward, in turns in one process.

    python benchmarks/step_time.py                       Llama-shaped, 120M, float32, value and output projections, 1%
    python benchmarks/step_time.py --of model            1% of the whole model's scalars, all within those projections
    python benchmarks/step_time.py --targets all-linear --json step_time.json

The floor computes the gradient with respect to the input embeddings, so that backward passes through every layer, and
has no optimizer. Ours adds the sampled gradient, AdamW and the writing of the deltas. LoRA joins where peft is
installed, with as many trainable scalars.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_zero import SparseConfig, sparsify
from sparse_zero.targets import find_targets
from sparse_zero.zero import device_name

Step = Callable[[torch.Tensor], None]


def llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights in Llama's shape: 124M parameters, GPT-2 small's width and depth."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=50304,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).to(arguments.device).train()


def frozen(model: nn.Module, arguments: argparse.Namespace) -> tuple[Step, int]:
    model.requires_grad_(False)

    def step(ids: torch.Tensor) -> None:
        embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
        model(inputs_embeds=embeddings, labels=ids).loss.backward()

    return step, 0


def sparse(model: nn.Module, arguments: argparse.Namespace) -> tuple[Step, int]:
    sparsify(model, SparseConfig(density=density_of_model(model, arguments), targets=targets_of(arguments)))
    return trained(model), model.sparsity.trainable_parameters


def lora(model: nn.Module, arguments: argparse.Namespace) -> tuple[Step, int]:
    import peft

    targets = find_targets(model, SparseConfig(targets=targets_of(arguments)), [])
    wanted = density_of_model(model, arguments) * sum(p.numel() for p in model.parameters())
    rank = max(1, round(wanted / sum(sum(target.shape) for target in targets.values())))
    modules = [name.removesuffix(".weight") for name in targets]
    config = peft.LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    return trained(model), sum(p.numel() for p in model.parameters() if p.requires_grad)


def full(model: nn.Module, arguments: argparse.Namespace) -> tuple[Step, int]:
    return trained(model), sum(p.numel() for p in model.parameters())


def trained(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


METHODS: dict[str, Callable[[nn.Module, argparse.Namespace], tuple[Step, int]]] = {
    "frozen": frozen,
    "sparse": sparse,
    "lora": lora,
    "full": full,
}


def targets_of(arguments: argparse.Namespace) -> str | None:
    return "all-linear" if arguments.targets == "all-linear" else None


def density_of_model(model: nn.Module, arguments: argparse.Namespace) -> float:
    """The trainable fraction of the whole model, also where --density is meant of the target weights."""
    if arguments.of == "model":
        return arguments.density
    targets = find_targets(model, SparseConfig(targets=targets_of(arguments)), [])
    selectable = sum(target.shape.numel() for target in targets.values())
    return arguments.density * selectable / sum(p.numel() for p in model.parameters())


def measure(arguments: argparse.Namespace) -> list[dict]:
    """One row for each method: median seconds, and the median over the rounds of its ratio to the floor."""
    steps, trainable, seconds = {}, {}, {}
    for name in arguments.methods:
        try:
            steps[name], trainable[name] = METHODS[name](llama(arguments), arguments)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    batches = torch.randint(
        50304, (arguments.rounds + 2, 1, arguments.tokens), generator=torch.Generator().manual_seed(1)
    ).to(arguments.device)
    for round_number, ids in enumerate(batches):
        for name, step in steps.items():
            synchronize(arguments.device)
            started = time.perf_counter()
            step(ids)
            synchronize(arguments.device)
            if round_number >= 2:  # warm-up
                seconds.setdefault(name, []).append(time.perf_counter() - started)
    floor = seconds["frozen"]
    rows = []
    for name, times in seconds.items():
        ratios = sorted(mine / base for mine, base in zip(times, floor, strict=True))
        rows.append(
            {
                "method": name,
                "trainable": trainable[name],
                "seconds": round(statistics.median(times), 4),
                "ratio_to_frozen": round(statistics.median(ratios), 3),
                "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
            }
        )
    return rows


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["frozen", "sparse", "lora", "full"])
    parser.add_argument("--targets", choices=["value-output", "all-linear"], default="value-output")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--of", choices=["targets", "model"], default="targets", help="what --density is a part of")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if "frozen" not in arguments.methods:
        parser.error("--methods must contain frozen, the floor")
    rows = measure(arguments)
    print(
        f"{device_name()}, {arguments.dtype}, {arguments.tokens} tokens, {arguments.targets}, "
        f"{arguments.density:.2%} of the {arguments.of}, {arguments.rounds} rounds"
    )
    print(f"{'method':<8} {'trainable':>12} {'s / step':>9} {'/ frozen':>9}   quartiles")
    for row in rows:
        print(
            f"{row['method']:<8} {row['trainable']:>12,} {row['seconds']:>9.3f} {row['ratio_to_frozen']:>9.3f}   "
            f"{row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
