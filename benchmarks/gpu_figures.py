"""The figures that want a GPU, for gpu.py: the command that measures each, what it needs, how its result is read."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gsm8k import METHODS as QUALITY_METHODS
from gsm8k import RATES, SEEDS
from methods import OURS, PEERS

Row = dict[str, Any]

SPARSE = ("transformers", "pydantic", "xxhash", "triton")
"""What importing sparse_zero's model and kernels needs, besides torch."""


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    name: str
    script: str
    arguments: tuple[str, ...]
    worth: int
    """Figures of more worth are measured first."""
    seconds: int
    """An estimate for an H200, with the imports and the compilation of kernels."""
    rows: Callable[[Any], list[Row]]
    """From the JSON file that the script writes to the rows of a table."""
    tiny: tuple[str, ...] = ()
    """Arguments that replace the same ones with --cpu."""
    needs: tuple[str, ...] = SPARSE
    gibibytes: int = 8
    """Memory of the GPU."""
    only_cuda: bool = False
    methods: tuple[str, ...] = ()
    """Passed as --methods."""
    sources: bool = False
    """Whether it needs --model and --gsm8k."""


def figures(records: Sequence[Row] = ()) -> list[Figure]:
    """All figures, the most worth first. Args: records: results, which decide about the runs of the quality."""
    found = [*_steps(), *_others(), *_quality(records)]
    return sorted(found, key=lambda figure: -figure.worth)


_TINY_STEP = ("--models", "llama-20m", "--tokens", "16", "--sequences", "1", "--rounds", "1")


def _steps() -> Iterator[Figure]:
    """Time and memory of a step. The memory is that beyond weights and optimizer."""

    def step(name: str, worth: int, seconds: int, methods: Sequence[str], *arguments: str, **more: Any) -> Figure:
        common = ("--dtypes", "bfloat16", "--rounds", "9", *arguments)
        needs = (*SPARSE, "peft") if any(method in PEERS for method in methods) else SPARSE
        return Figure(
            name, "step_time.py", common, worth, seconds, _step_rows, _TINY_STEP, needs, methods=("frozen", *methods),
            **more,
        )  # fmt: skip

    of = {"1B": ("--models", "llama-1b"), "7B": ("--models", "llama-7b")}
    everything, values = ("--targets", "all-linear"), ("--targets", "value-output")
    yield step("step, 1B, all linear: ours and LoRA", 100, 90, (*OURS, "lora", "lora-bf16"), *of["1B"], *everything,
               gibibytes=70)  # fmt: skip
    yield step("step, 7B, all linear: ours and LoRA", 95, 150, ("columns", "whole", "lora", "lora-bf16"), *of["7B"],
               *everything, gibibytes=110)  # fmt: skip
    yield step("step, 7B, all linear: single scalars and strips", 60, 120, ("sparse", "sparse-16"), *of["7B"],
               *everything, gibibytes=90)  # fmt: skip
    yield step("step, 1B, all linear, compiled", 85, 150, OURS, *of["1B"], *everything, "--compile", gibibytes=70)
    yield step("step, 7B, all linear, compiled", 55, 300, ("columns", "whole"), *of["7B"], *everything, "--compile",
               gibibytes=110)  # fmt: skip
    yield step("step, 1B, all linear: other peers", 50, 180, ("dora", "shira", "supertuning", "peft-sparta", "full"),
               *of["1B"], *everything, "--together", "2", gibibytes=70)  # fmt: skip
    yield step("step, 1B, value and output", 45, 90, (*OURS, "lora", "lora-bf16"), *of["1B"], *values, gibibytes=70)
    yield step("step, 7B, value and output", 30, 150, ("sparse", "columns", "whole", "lora"), *of["7B"], *values,
               "--together", "1", gibibytes=130)  # fmt: skip


def _others() -> Iterator[Figure]:
    for dtype, worth in (("float32", 80), ("bfloat16", 40)):
        yield Figure(
            f"Random Position Noise, {dtype}", "noise.py", ("--dtype", dtype), worth, 40, _noise_rows,
            ("--shape", "2", "16", "32", "--rounds", "1"), ("transformers", "triton"),
        )  # fmt: skip
    yield Figure(
        "launches, 1B", "launches.py", ("--model", "llama-1b", "--dtype", "bfloat16", "--tokens", "2048"), 75, 90,
        _launch_rows, ("--model", "llama-20m", "--tokens", "16", "--rounds", "3"), (*SPARSE, "peft"), 40,
        methods=(*OURS, "lora"),
    )  # fmt: skip
    yield Figure(
        "gradient of one weight", "gradient_gpu.py", ("--rounds", "7"), 35, 240, _gradient_rows, (),
        ("xxhash", "triton"), only_cuda=True,
    )  # fmt: skip
    yield Figure(
        "memory of a rank, 120M", "memory.py", ("--ranks", "1", "--dtypes", "bfloat16"), 25, 150, _memory_rows,
        ("--model", "llama-20m", "--tokens", "16"), (*SPARSE, "peft"), methods=("frozen", *OURS, "lora", "full"),
    )  # fmt: skip
    for dtype, worth in (("bfloat16", 28), ("float32", 15)):
        yield Figure(
            f"experts, {dtype}", "experts.py", ("--dtype", dtype), worth, 60, _expert_rows,
            ("--hidden", "32", "--layers", "1", "--tokens", "16", "--experts", "4", "--rounds", "1"),
        )  # fmt: skip


QUALITY = "GSM8K"
"""How the names of the quality figures begin."""


def _quality(records: Sequence[Row]) -> Iterator[Figure]:
    """One epoch each: every rate with the first seed and then, at the best rate of each method, the other seeds."""
    found = losses(records)
    for place, method in enumerate(QUALITY_METHODS):
        first = {rate: found.get((method, rate, SEEDS[0])) for rate in RATES[method]}
        for rate in first:
            yield _quality_run(method, rate, SEEDS[0], 24 - place)
        if None not in first.values():
            best = min(first, key=first.get)
            for seed in SEEDS[1:]:
                yield _quality_run(method, best, seed, 19 - place)


def _quality_run(method: str, rate: float, seed: int, worth: int) -> Figure:
    return Figure(
        f"{QUALITY}, {method}, rate {rate:g}, seed {seed}", "gsm8k.py",
        ("--method", method, "--rate", str(rate), "--seed", str(seed), "--answers", "200"), worth, 75,
        lambda row: [row], ("--limit", "8", "--batch", "2", "--answers", "2"), (*SPARSE, "peft"), 20, sources=True,
    )  # fmt: skip


def losses(records: Sequence[Row]) -> dict[tuple[str, float, int], float]:
    """The loss of each quality run: by method, rate and seed."""
    rows = [row for record in records if record["figure"].startswith(QUALITY) for row in record["rows"]]
    return {(row["method"], row["rate"], row["seed"]): row["loss"] for row in rows}


def quality_rows(records: Sequence[Row]) -> list[Row]:
    """For each method and rate the loss, and the share of exact answers in percent: mean and standard deviation over
    the seeds.
    """
    found: dict[tuple[str, float], list[Row]] = {}
    for record in records:
        for row in record["rows"]:
            found.setdefault((row["method"], row["rate"]), []).append(row)
    return [
        {"method": method, "scalars": runs[0]["trained"], "rate": f"{rate:g}", "seeds": len(runs)}
        | _spread("loss", [run["loss"] for run in runs])
        | _spread("exact, %", [100 * run["exact"] for run in runs if "exact" in run])
        for method in QUALITY_METHODS
        for rate in RATES[method]
        if (runs := found.get((method, rate)))
    ]


def _spread(name: str, values: list[float]) -> Row:
    if not values:
        return {}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.mean(values), f"± {name.removesuffix(', %')}": deviation}


def _step_rows(results: list[Row]) -> list[Row]:
    return [
        {
            "method": name,
            "/ frozen": row["over_frozen"]["median"],
            "quartiles": f"{row['over_frozen']['lower']:.3f} to {row['over_frozen']['upper']:.3f}",
            "s / step": statistics.median(row["seconds"]),
            "GiB of a step": row["step_bytes"] / 2**30 if "step_bytes" in row else None,
            "scalars": row["trainable"],
        }
        for result in results
        for name, row in result["methods"].items()
    ] + [{"method": f"{name}: {reason}"} for result in results for name, reason in result["left_out"].items()]


def _noise_rows(result: Row) -> list[Row]:
    rows = [
        {"p": row["probability"], "method": row["method"], "ms": 1e3 * row["seconds"], "/ rpn": row["ratio_to_rpn"]}
        for row in result["rows"]
    ]
    return rows + [
        {"p": row["probability"], "method": "share of a demo step", "ms": 1e3 * row["noise_seconds"],
         "/ step": row["share_of_step"]}
        for row in result["shares"]
    ]  # fmt: skip


def _launch_rows(results: list[Row]) -> list[Row]:
    phases = ("forward", "backward", "accumulating", "step")
    return [
        {"method": row["method"], "weights": row["weights"]}
        | {phase: sum(row[phase].values()) / row["weights"] for phase in phases}
        | {f"{name}, us": value for name, value in row.get("microseconds", {}).items()}
        for result in results
        for row in result["rows"]
    ]


def _gradient_rows(results: list[Row]) -> list[Row]:
    return [
        {"weight": " x ".join(map(str, case["shape"])), "tokens": case["tokens"], "density": case["density"]}
        | {f"{way}, ms": 1e3 * seconds for way, seconds in case["seconds"].items()}
        for case in results[-1]["cases"]
    ]


def _memory_rows(results: list[Row]) -> list[Row]:
    parts = ("weights", "trained", "optimizer", "indices", "originals", "activations", "transient", "peak")
    return [
        {"method": row["method"]}
        | ({part: row["ranks"][0][part] / 2**20 for part in parts} if "ranks" in row else {"weights": row["failure"]})
        for result in results
        for row in result["runs"]
    ]


def _expert_rows(result: Row) -> list[Row]:
    return [
        {"experts": row["experts"], "method": row["method"], "/ frozen": row["ratio_to_frozen"],
         "s / step": row["seconds"], "MiB beyond frozen": row["beyond_frozen_mib"]}
        for row in result["rows"]
    ]  # fmt: skip
