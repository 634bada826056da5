"""Time of a training step: ours, forward and backward of the frozen model, and every peer, in turns in one process.

    python benchmarks/step_time.py --suite cpu       120M, two sets of targets, float32 and bfloat16
    python benchmarks/step_time.py --suite gpu       1B and 7B shapes, bfloat16, 4 and 2 sequences of 2,048 tokens
    python benchmarks/step_time.py --suite cpu_compiled       ours and the frozen model under torch.compile
    python benchmarks/step_time.py --suite cpu --plot          no runs: page and plot again from the JSON
    python benchmarks/step_time.py --targets value-output --dtypes float32 --methods frozen sparse lora

The suites write step_time_cpu.json (or _gpu), a page and a plot to benchmarks/results. A setting that is in the file
is not run again. All methods of methods.py train as many scalars as a LoRA whose rank is nearest to --density. The
sequences stay the same, so that a decreasing loss shows that a method trains. The order is random in each round, and
ratios are taken within a round. MFU is `methods.flops_of_step` relative to the device's peak.
If not all methods fit into one process, --together 2 measures the peers two at a time, each time with the floor and
ours.
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from methods import (
    METHODS,
    OURS,
    SHAPES,
    TARGETS,
    Budget,
    flops_of_step,
    llama,
    llama_config,
    prepare,
    trained_parameters,
    training_step,
)
from tables import RESULTS, Row, read, spread, table, write
from turns import in_turns, peak_flops, ratio

from sparse_zero.training.device import device_name

SUITES = {
    "cpu": {"models": ["llama-120m"], "targets": list(TARGETS), "dtypes": ["float32", "bfloat16"]},
    "gpu": {"models": ["llama-1b", "llama-7b"], "targets": list(TARGETS), "dtypes": ["bfloat16"]},
    "cpu_compiled": {
        "models": ["llama-120m"],
        "targets": list(TARGETS),
        "dtypes": ["float32"],
        "methods": ["frozen", "sparse"],
        "compile": True,
    },
}
SEQUENCES = {"llama-1b": 4, "llama-7b": 2}
GOALS = {"frozen": {"value-output": 1.05, "all-linear": 1.10}, "lora": 0.97, "peft-sparta": 0.70, "shira": 0.85}
"""The largest ratio of a `sparse` step to each method's. Those to peers apply to all linear layers."""


@dataclass(frozen=True)
class Setting:
    model: str
    targets: str
    dtype: str
    tokens: int
    density: float
    of: str
    rounds: int
    device: str
    sequences: int = 1
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"{self.model}, {self.targets}, {self.dtype}, {100 * self.density:g}%{compiled}"


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    for model, dtype, targets in itertools.product(arguments.models, arguments.dtypes, arguments.targets):
        tokens = arguments.tokens or (2048 if model in SUITES["gpu"]["models"] else 1024)
        how = arguments.density, arguments.of, arguments.rounds, arguments.device
        sequences = arguments.sequences or SEQUENCES.get(model, 1)
        yield Setting(model, targets, dtype, tokens, *how, sequences, arguments.compile)


def groups(methods: list[str], together: int | None) -> Iterator[list[str]]:
    """The groups of methods that are measured in one process: always the floor and ours, with some of the peers."""
    always = [name for name in methods if name in ("frozen", *OURS)]
    peers = [name for name in methods if name not in always]
    size = together or max(1, len(peers))
    for start in range(0, max(1, len(peers)), size):
        yield always + peers[start : start + size]


def measure(setting: Setting, methods: list[str], together: int | None = None) -> Row:
    """Measure a setting. Returns: the setting, and a row for each method that could run."""
    dtype = getattr(torch, setting.dtype)
    config = llama_config(setting.model)
    peak, known_from = peak_flops(dtype, setting.device)
    rows: dict[str, Row] = {}
    left_out: dict[str, str] = {}
    for names in groups(methods, together):
        seconds, facts = _measure_together(setting, names, left_out)
        for name, times in seconds.items():
            if name in rows:
                continue  # ours and the floor, from the first group
            rows[name] = facts[name] | {"seconds": times, "over_frozen": ratio(times, seconds["frozen"])}
            for own in OURS:
                if own in seconds and name not in ("frozen", *OURS):
                    rows[name][f"{own}_over"] = ratio(seconds[own], times)
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        flops = setting.sequences * flops_of_step(config, setting.tokens, weight_gradients=name == "full")
        tokens = setting.sequences * setting.tokens
        row |= {"tokens_per_second": tokens / median, "mfu": flops / median / peak}
    return {
        "setting": asdict(setting),
        "machine": device_name(),
        "torch": torch.__version__,
        "peak_flops": peak,
        "peak_flops_from": known_from,
        "methods": rows,
        "left_out": left_out,
    }


def _measure_together(
    setting: Setting, names: list[str], left_out: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, Row]]:
    """Returns: seconds by method and round; scalars and losses by method."""
    gc.collect()
    config = llama_config(setting.model)
    base = llama(config, getattr(torch, setting.dtype), setting.device)
    budget = Budget.of(base, TARGETS[setting.targets], setting.density, setting.of == "model")
    size = setting.sequences, setting.tokens
    ids = torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(1))
    ids = ids.to(setting.device)
    steps, facts = {}, {}
    for name in names:
        try:
            model = prepare(name, base, budget)
            step = training_step(torch.compile(model, fullgraph=True) if setting.compiled else model, ids)
            first = step().item()
        except (ImportError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        steps[name] = step
        trainable = sum(p.numel() for p in trained_parameters(model))
        facts[name] = {"trainable": trainable, "budget": budget.scalars, "first_loss": first}
    seconds = in_turns(steps, setting.rounds, setting.device)
    for name, step in steps.items():
        if setting.device != "cpu":
            facts[name]["step_bytes"] = bytes_of_step(step)
        facts[name]["last_loss"] = step().item()
    return seconds, facts


def bytes_of_step(step: Callable[[], torch.Tensor]) -> int:
    """The peak of what torch has allocated on the accelerator during a step, beyond what it had before: activations,
    gradients and temporary tensors, without weights and optimizer."""
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    step()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before


def page(results: list[Row]) -> str:
    return "\n\n".join(["# Time of a training step", *map(_section, results)])


def _section(result: Row) -> str:
    setting = Setting(**result["setting"])
    rows = []
    for name, row in result["methods"].items():
        rows.append(
            [
                name,
                f"{row['trainable']:,}",
                f"{statistics.median(row['seconds']):.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                spread(row["over_frozen"]),
                *(spread(row.get(f"{own}_over")) for own in OURS),
                f"{row['step_bytes'] / 2**30:.2f}" if "step_bytes" in row else "",
                f"{row['first_loss']:.3f} to {row['last_loss']:.3f}",
            ]
        )
    header = ["method", "trainable", "s / step", "tokens/s", "MFU", "/ frozen", *(f"{own} / it" for own in OURS)]
    lines = [
        f"## {setting}",
        f"{result['machine']}, torch {result['torch']}, {setting.sequences} x {setting.tokens:,} tokens, "
        f"{setting.density:.2%} of the {setting.of}, {setting.rounds} rounds; medians [quartiles] of ratios within a "
        "round. "
        f"MFU of {result['peak_flops'] / 1e12:.2f} TFLOP/s ({result['peak_flops_from']}).",
        table([*header, "GiB of a step", "loss"], rows),
    ]
    lines += [f"Left out: {name} ({reason})." for name, reason in result["left_out"].items()]
    lines += [
        f"{name} trains {row['trainable'] / row['budget'] - 1:+.1%} scalars."
        for name, row in result["methods"].items()
        if name not in ("frozen", "full") and abs(row["trainable"] / row["budget"] - 1) > 0.01
    ]
    if goals := goal_results(result):
        lines.append("Goals: " + "; ".join(goals) + ".")
    return "\n\n".join(lines)


def goal_results(result: Row) -> list[str]:
    """The goals of GOALS, and whether they are met."""
    targets, methods = result["setting"]["targets"], result["methods"]
    said = []
    for name, goal in GOALS.items():
        if isinstance(goal, dict):
            goal, found = goal[targets], methods.get("sparse", {}).get("over_frozen")
        else:
            found = methods.get(name, {}).get("sparse_over") if targets == "all-linear" else None
        if found:
            said.append(f"/ {name} <= {goal:.2f}: {'met' if found['median'] <= goal else 'missed'}")
    return said


def plot(results: list[Row], figure: Any) -> None:
    """Plot step times relative to the floor: a panel for each setting."""
    columns = min(2, len(results))
    lines = -(-len(results) // columns)
    figure.set_size_inches(5.5 * columns, 3.2 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(results) :]:
        panel.axis("off")
    for panel, result in zip(panels, results, strict=False):
        names = list(reversed(result["methods"]))
        figures = [result["methods"][name]["over_frozen"] for name in names]
        medians = [each["median"] for each in figures]
        errors = [
            [each["median"] - each["lower"] for each in figures],
            [each["upper"] - each["median"] for each in figures],
        ]
        colors = ["tab:blue" if name in OURS else "tab:gray" if name == "frozen" else "tab:orange" for name in names]
        panel.barh(names, medians, xerr=errors, color=colors, capsize=2)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(str(Setting(**result["setting"])), fontsize="medium")
        panel.set_xlabel("step / frozen forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="measure the models, targets and dtypes of a stored table")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-120m"])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["value-output"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument(
        "--of", choices=["targets", "model"], default="targets", help="--density is a fraction of these scalars"
    )
    parser.add_argument("--tokens", type=int, help="default: 2,048 for llama-1b and llama-7b, else 1,024")
    parser.add_argument(
        "--sequences", type=int, help="sequences of a step; default: 4 for llama-1b, 2 for llama-7b, else 1"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="every method under torch.compile(fullgraph=True)")
    parser.add_argument("--together", type=int, help="number of peers in memory at the same time; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, help="write results here, page and plot to the same directory; set by --suite"
    )
    parser.add_argument("--plot", action="store_true", help="no runs: only page and plot of the existing results")
    arguments = parser.parse_args()
    if "frozen" not in arguments.methods:
        parser.error("--methods must contain frozen, the floor")
    if arguments.suite:
        vars(arguments).update(SUITES[arguments.suite])
        arguments.json = arguments.json or RESULTS / f"step_time_{arguments.suite}.json"
    if arguments.plot:
        if not arguments.json:
            parser.error("--plot needs --suite or --json")
        write(arguments.json, read(arguments.json), page, plot)
        print(page(read(arguments.json)))
        return
    results = read(arguments.json) if arguments.json else []
    for setting in settings(arguments):
        if any(Setting(**result["setting"]) == setting for result in results):
            continue
        results.append(measure(setting, arguments.methods, arguments.together))
        print(_section(results[-1]), flush=True)
        if arguments.json:
            write(arguments.json, results, page, plot)


if __name__ == "__main__":
    main()
