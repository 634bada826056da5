"""The gradient at selected positions on a GPU: Triton kernels, dense product, cuSPARSE, and the cost model's choice.

    python benchmarks/gradient_gpu.py
    python benchmarks/gradient_gpu.py --tokens 4096 --shapes 4096x4096 --dtype float16 --json gradient_gpu.json
    python benchmarks/gradient_gpu.py --plot         no runs: page and plot again from the JSON

Writes gradient_gpu.json, a page and a plot to benchmarks/results. In each round all methods take turns; the figures
are medians of the device's time.
    sampled    the Triton kernel for single positions
    strips     the Triton kernel for as many positions in strips of 16
    dense      the dense product in chunks, read at the positions
    cusparse   torch.sparse.sampled_addmm on float32 copies, which are not timed: it does not support half precision
`chosen` is the cost model's choice for single positions and for strips, with an exclamation mark if the other method
was faster. The last table has this device's values of the cost model's constants.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import RESULTS, Row, read, table, write

from sparse_zero.gradient import cost
from sparse_zero.gradient.cost import Speeds, TokenChunks, is_cheaper, strips_per_tile
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.gradient.sampled import _METHODS, TRANSIENT_BYTES
from sparse_zero.selection import draws

TAKEN = ("sampled", "strips", "dense", "cusparse")
DENSITIES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
GRANULARITY = 16
AHEAD_CLOCKS = 4_000_000
"""Clocks of the device, about two milliseconds, for which it is kept busy before the first kernel."""


def seconds(function: Callable[[], object]) -> float:
    """The time on the device from the first kernel to the last, while the host is ahead."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD_CLOCKS)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each function. The first round, which compiles and warms up, does not count."""
    taken = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, function in ways.items():
            once = seconds(function)
            if turn:
                taken[name].append(once)
    return {name: statistics.median(each) for name, each in taken.items()}


def drawn(R: int, C: int, n: int, device: torch.device, granularity: int = 1) -> Pattern:
    """A pattern as a model stores it."""
    indices = draws.stratified_positions(0, "weight", R * C // granularity, n // granularity, device=device)
    return Pattern(indices.int(), R, C, granularity)


def case(N: int, R: int, C: int, density: float, dtype: torch.dtype, device: torch.device, rounds: int) -> Row:
    from sparse_zero.gradient import triton_kernels

    n = max(1, round(density * R * C / GRANULARITY)) * GRANULARITY
    rows, columns = (torch.randn(N, features, device=device, dtype=dtype) for features in (R, C))
    wide_rows, wide_columns = rows.float(), columns.float()
    pattern, strips = drawn(R, C, n, device), drawn(R, C, n, device, GRANULARITY)
    places = pattern.block_starts, pattern.strip_columns
    zeros = torch.sparse_csr_tensor(*places, torch.zeros(pattern.count, device=device), (R, C))
    ways = {
        "sampled": lambda: triton_kernels.sampled(rows, columns, pattern, TRANSIENT_BYTES),
        "strips": lambda: triton_kernels.strips(rows, columns, strips, TRANSIENT_BYTES),
        "dense": lambda: _METHODS["dense"](rows, columns, pattern, dtype, TRANSIENT_BYTES),
        "cusparse": lambda: torch.sparse.sampled_addmm(zeros, wide_rows.t(), wide_columns, beta=0.0).values(),
    }
    exact = ways["cusparse"]()
    error = (ways["sampled"]() - exact).abs().max() / exact.abs().max()
    # cuSPARSE may round float32 operands to TF32 if that is allowed
    assert error < 1e-3, f"the kernel and cuSPARSE differ by {error:.1e} of the largest value"
    taken = medians(ways, rounds)
    properties = torch.cuda.get_device_properties(device)
    speeds = Speeds.of(properties)
    shape = (N, R, C, n)
    return {
        "tokens": N,
        "shape": [R, C],
        "density": density,
        "n": n,
        "seconds": taken,
        "model": {
            "sampled": cost.sampled_seconds(*shape, dtype, speeds, TRANSIENT_BYTES),
            "strips": cost.strips_seconds(*shape, GRANULARITY, dtype, speeds, TRANSIENT_BYTES),
            "dense": cost.dense_seconds(*shape, dtype, speeds, TRANSIENT_BYTES),
        },
        "cheaper": {
            "sampled": is_cheaper(*shape, dtype, properties, TRANSIENT_BYTES),
            "strips": is_cheaper(*shape, dtype, properties, TRANSIENT_BYTES, GRANULARITY),
        },
    }


HEADER = ["tokens", "shape", "density", *TAKEN, "chosen", "of strips"]


def cells(result: Row) -> list[str]:
    taken = result["seconds"]
    listed = [f"{result['tokens']:,}", "x".join(map(str, result["shape"])), f"{result['density']:.2%}"]
    listed += [f"{1e3 * taken[way]:.3f}" for way in TAKEN]
    for way in ("sampled", "strips"):
        wrong = result["cheaper"][way] != (taken[way] < taken["dense"])
        listed.append((way if result["cheaper"][way] else "dense") + "!" * wrong)
    return listed


def page(runs: list[Row]) -> str:
    return "\n\n".join(["# Time of a gradient on a GPU", *map(_section, runs)])


def _section(run: Row) -> str:
    measured = [
        [name, f"{value:.3g}", f"{getattr(cost, name.split()[0]):.3g}"] for name, value in run["constants"].items()
    ]
    return "\n\n".join(
        [
            f"## {run['device']}, {run['dtype']}",
            f"torch {run['torch']}; milliseconds, medians of {run['rounds']} rounds. An exclamation mark where "
            "the method that is not chosen takes less time.",
            table(HEADER, [cells(result) for result in run["cases"]]),
            table(["constant", "here", "cost model"], measured),
        ]
    )


def plot(runs: list[Row], figure: Any) -> None:
    """Times relative to the dense product: a panel for each shape and number of tokens of the first run."""
    cases = runs[0]["cases"]
    kinds = list(dict.fromkeys((tuple(case["shape"]), case["tokens"]) for case in cases))
    columns = min(3, len(kinds))
    figure.set_size_inches(4 * columns, 3 * -(-len(kinds) // columns))
    panels = list(figure.subplots(-(-len(kinds) // columns), columns, squeeze=False).flat)
    for panel in panels[len(kinds) :]:
        panel.axis("off")
    for panel, (shape, tokens) in zip(panels, kinds, strict=False):
        here = [case for case in cases if (tuple(case["shape"]), case["tokens"]) == (shape, tokens)]
        for way in ("sampled", "strips"):
            ratios = [case["seconds"][way] / case["seconds"]["dense"] for case in here]
            panel.loglog([case["density"] for case in here], ratios, marker=".", label=way)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_title(f"{shape[0]} x {shape[1]}, {tokens:,} tokens", fontsize="medium")
    panel.legend()
    figure.supxlabel("density")
    figure.supylabel("time / dense product")


def constants(dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """The cost model's constants that are fractions of a peak, each measured separately."""
    from sparse_zero.gradient import triton_kernels

    properties = torch.cuda.get_device_properties(device)
    speeds = Speeds.of(properties)
    clocks = properties.multi_processor_count * properties.clock_rate * 1e3
    N = R = C = 4096
    n = R * C // 100 // GRANULARITY * GRANULARITY
    square = torch.randn(2 * N, 2 * N, device=device, dtype=dtype)
    room, nothing = torch.empty(2**30, dtype=torch.uint8, device=device), torch.empty(1, device=device)
    rows, columns = (torch.randn(N, features, device=device, dtype=dtype) for features in (R, C))
    pattern, strips = drawn(R, C, n, device), drawn(R, C, n, device, GRANULARITY)
    last = torch.empty(
        C, TokenChunks.fit(N, R + C, dtype, TRANSIENT_BYTES, cached=C).width, dtype=dtype, device=device
    )
    piece = columns[: last.shape[1]]
    block = cost.LINE // dtype.itemsize
    copied = room.numel() // 2
    ways = {
        "product": lambda: square @ square,
        "copy": lambda: room[:copied].copy_(room[copied:]),
        "tokens_last": lambda: triton_kernels._tokens_last((piece,), last, block),
        "launches": lambda: [nothing.zero_() for _ in range(100)],
        "sampled": lambda: triton_kernels.sampled(rows, columns, pattern, TRANSIENT_BYTES),
        "strips": lambda: triton_kernels.strips(rows, columns, strips, TRANSIENT_BYTES),
    }
    taken = medians(ways, rounds)
    pieces = N / last.shape[1]
    gathered = N * dtype.itemsize * (n + R + n / cost.GATHER_TILE)
    tiles = math.ceil(n / R / strips_per_tile(n // GRANULARITY, R // GRANULARITY, GRANULARITY))
    by_strips = N * dtype.itemsize * (n // GRANULARITY + R * tiles)
    return {
        "DENSE_SHARE": 2 * (2 * N) ** 3 / taken["product"] / speeds.flops(dtype),
        "MEMORY_SHARE": 2 * copied / taken["copy"] / (speeds.memory / cost.MEMORY_SHARE),
        "MEMORY_SHARE of the copies": 2 * last.nbytes / taken["tokens_last"] / (speeds.memory / cost.MEMORY_SHARE),
        "CACHE_BYTES": gathered / (taken["sampled"] - 2 * pieces * taken["tokens_last"]) / clocks,
        "STRIPS_SHARE": by_strips / (taken["strips"] - pieces * taken["tokens_last"]) / speeds.cache,
        "LAUNCH_SECONDS": taken["launches"] / 100,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 16384])
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "4096x4096", "14336x4096"], help="ROWSxCOLUMNS")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results, if all cases are run")
    parser.add_argument("--plot", action="store_true", help="no runs: only page and plot of the existing results")
    arguments = parser.parse_args()
    is_whole = all(getattr(arguments, name) == parser.get_default(name) for name in ("tokens", "shapes", "densities"))
    arguments.json = arguments.json or (RESULTS / "gradient_gpu.json" if is_whole else None)
    if arguments.plot:
        write(arguments.json, read(arguments.json), page, plot)
        return
    if not torch.cuda.is_available():
        print("no GPU", file=sys.stderr)
        sys.exit(1)
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    name = torch.cuda.get_device_name(device)
    results = []
    for shape in arguments.shapes:
        R, C = map(int, shape.split("x"))
        for N in arguments.tokens:
            for density in arguments.densities:
                results.append(case(N, R, C, density, dtype, device, arguments.rounds))
                print(" ".join(text.rjust(11) for text in cells(results[-1])), flush=True)
    run = {"device": name, "dtype": arguments.dtype, "torch": torch.__version__, "rounds": arguments.rounds}
    run |= {"cases": results, "constants": constants(dtype, device, arguments.rounds)}
    same = {"device": name, "dtype": arguments.dtype}
    if arguments.json:
        others = [other for other in read(arguments.json) if not same.items() <= other.items()]
        write(arguments.json, [*others, run], page, plot)
    print(_section(run).split("\n\n")[-1])


if __name__ == "__main__":
    main()
