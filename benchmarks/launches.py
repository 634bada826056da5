"""How many operators, or on a GPU kernels, a training step launches beyond the frozen model's, for each weight.

    python benchmarks/launches.py                                  20M in float32, all linear layers
    python benchmarks/launches.py --model llama-1b --dtype bfloat16 --device cuda
    python benchmarks/launches.py --label "one call for each weight"   a name for this version of the code

Counted, not timed. On a CPU: the operators that reach a kernel, without views and allocations; ours count as a whole.
On a GPU: each kernel, copy and fill that torch.profiler finds. Phases of a step:

    forward          of a micro-batch, minus the frozen model's
    backward         of the first micro-batch, minus the frozen model's
    accumulating     backward of the second micro-batch, minus that of the first: adding to the gradients
    step             AdamW and writing the deltas, minus AdamW on as many parameters of the same sizes

The time of the host is measured apart: microseconds per weight, the least of --rounds, of writing
the deltas after a step and of the check in a forward that finds them written. --rounds 0 only counts.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, OURS, SHAPES, TARGETS, Budget, llama, llama_config, prepare, trained_parameters
from tables import RESULTS, Row, read, table
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from turns import synchronize

from sparse_zero import refresh
from sparse_zero.training.device import device_name

NO_WORK = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "_unsafe_view"),
    *("_local_scalar_dense", "promote_types", "result_type"),
}
"""Operators of aten that only make a tensor of unset or existing memory, or read a number or a dtype. Views do not
count either."""

PHASES = ("forward", "backward", "accumulating", "step")


class _Operators(TorchDispatchMode):
    """Counts the operators that reach a kernel: `linear` counts as the `mm` that it calls, and ours as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        makes_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if space in ("aten", "sparse_zero") and not makes_view and name not in NO_WORK:
            self.counted[f"{space}::{name}"] += 1
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], Any], device: str) -> Counter[str]:
    """The operators that a function calls, or on a GPU the kernels, copies and fills that it launches, by name."""
    if device == "cpu":
        with _Operators() as operators:
            run()
        return operators.counted
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize(device)
    return Counter(event.name for event in profiler.events() if event.device_type != DeviceType.CPU)


def phases(model: nn.Module, ids: torch.Tensor, device: str) -> dict[str, Counter[str]]:
    """The launches of each phase of the third step; the first ones compile operators and create states."""
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters, fused=device != "cpu" or None) if parameters else None
    found: dict[str, Counter[str]] = {}
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(not parameters)
    for _ in range(3):
        held: list[torch.Tensor] = []

        def forward(held: list = held) -> None:
            held.append(model(inputs_embeds=embeddings, labels=ids).loss)

        def backward(held: list = held) -> None:
            held.pop().backward()

        found["forward"] = launches(forward, device)
        found["backward"] = launches(backward, device)
        forward()
        found["accumulating"] = launches(backward, device)
        if optimizer:
            found["step"] = launches(optimizer.step, device)
            optimizer.zero_grad()
        embeddings.grad = None
    found["accumulating"] -= found["backward"]
    return found


def of_optimizer(sizes: list[int], device: str) -> Counter[str]:
    """The launches of AdamW on parameters of these sizes."""
    parameters = [nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
    optimizer = torch.optim.AdamW(parameters, fused=device != "cpu" or None)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        counted = launches(optimizer.step, device)
    return counted


def host_microseconds(model: nn.Module, ids: torch.Tensor, device: str, rounds: int) -> dict[str, float]:
    """Microseconds of the host for each weight: writing the deltas, and one check of a weight in a forward."""
    weights = list(model.sparsity.weights.values())

    def write() -> None:
        refresh(model)

    def check() -> None:
        for weight in weights:
            weight.refresh()

    microseconds = {}
    for name, function in (("write", write), ("check", check)):
        times = []
        for _ in range(rounds):
            if function is write:
                for weight in weights:
                    weight.invalidate()  # as a step does
            synchronize(device)
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        microseconds[name] = 1e6 * min(times) / len(weights)
    return microseconds


def measure(arguments: argparse.Namespace) -> list[Row]:
    """One row for each method."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    base = llama(llama_config(arguments.model), dtype, device)
    budget = Budget.of(base, TARGETS[arguments.targets], arguments.density)
    ids = torch.randint(base.config.vocab_size, (1, arguments.tokens), device=device)
    floor = phases(prepare("frozen", base, budget), ids, device)
    rows = []
    for method in arguments.methods:
        model = prepare(method, base, budget)
        sizes = [parameter.numel() for parameter in trained_parameters(model)]
        found = phases(model, ids, device)
        found["forward"] -= floor["forward"]
        found["backward"] -= floor["backward"]
        found["step"] -= of_optimizer(sizes, device)
        row: Row = {"method": method, "weights": len(sizes)}
        row |= {phase: dict(found[phase].most_common()) for phase in PHASES}
        if method in OURS and arguments.rounds:
            row["microseconds"] = host_microseconds(model, ids, device, arguments.rounds)
        rows.append(row)
        del model
    return rows


def page(results: list[Row]) -> str:
    lines = [
        [
            result["label"],
            f"{result['model']}, {result['dtype']}, {result['machine']}",
            row["method"],
            str(row["weights"]),
            *(f"{sum(row[phase].values()) / row['weights']:.2f}" for phase in PHASES),
            *(f"{row['microseconds'][name]:.1f}" if "microseconds" in row else "" for name in ("write", "check")),
        ]
        for result in results
        for row in result["rows"]
    ]
    header = ["version", "setting", "method", "weights", *PHASES, "write, us", "check, us"]
    return "\n\n".join(
        [
            "# Launches for each weight",
            "Operators (on a GPU: kernels) of a step beyond those of the frozen model and of AdamW, divided by the "
            "number of trained tensors; and microseconds of the host. Made by `python benchmarks/launches.py`, whose "
            "docstring says what is counted.",
            table(header, lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-20m")
    parser.add_argument("--targets", choices=TARGETS, default="all-linear")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=[*OURS, "lora"], choices=[n for n in METHODS if n != "frozen"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--label", default="this version", help="a name for this version of the code")
    parser.add_argument("--json", type=Path, default=RESULTS / "launches.json")
    arguments = parser.parse_args()
    machine = device_name() if arguments.device != "cpu" else "CPU"
    named = ("label", "model", "targets", "dtype", "density", "tokens")
    result = {name: getattr(arguments, name) for name in named}
    result |= {"machine": machine, "torch": torch.__version__}
    others = [other for other in read(arguments.json) if not result.items() <= other.items()]
    result["rows"] = measure(arguments)
    write_page(arguments.json, [*others, result])
    print(page([result]))


def write_page(path: Path, results: list[Row]) -> None:
    """Write the JSON file and the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(results) + "\n")


if __name__ == "__main__":
    main()
