"""Time of the gradient at the selected positions, by each method and at many densities, in turns in one process.

    python benchmarks/gradient.py                        a table, and the cost model's constants fitted to it
    python benchmarks/gradient.py --sizes 768x768 4096x4096 --densities 0.01 0.05 --json gradient.json

Each figure is the median over all rounds of the ratio to the dense product in float32 in the same round. `chosen` is
the result of cheaper_method, `best` the faster method. The last table has the cost of positions, stored or
regenerated, in one gradient and one write of the deltas, as fractions of that gradient (sampled).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from turns import in_turns, ratio

from sparse_zero.gradient import cpu
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.gradient.sampled import _METHODS, TRANSIENT_BYTES, cheaper_method
from sparse_zero.selection.draws import STRATIFIED
from sparse_zero.selection.rules import Selection
from sparse_zero.training.device import device_name


def medians(calls: dict[str, Callable[[], object]], floor: str, rounds: int) -> dict[str, float]:
    """The median ratio of each call to the floor's time in the same round."""
    seconds = in_turns(calls, rounds)
    return {name: ratio(times, seconds[floor])["median"] for name, times in seconds.items()}


def draw_of(R: int, C: int, density: float, granularity: int) -> Selection:
    count = max(1, round(density * R * C / granularity)) * granularity
    return Selection(STRATIFIED, "weight", (R, C), count, granularity=granularity)


def strips_of(selection: Selection) -> torch.Tensor:
    """Positions as SparseWeight draws them."""
    return torch.cat([chunk.to(selection.strip_dtype) for chunk in selection.strip_chunks()])


def measure(
    R: int, C: int, density: float, granularity: int, dtype: torch.dtype, arguments: argparse.Namespace
) -> dict:
    N, selection = arguments.tokens, draw_of(R, C, density, granularity)
    pattern = Pattern(strips_of(selection), R, C, granularity)
    rows, columns = torch.randn(N, R), torch.randn(N, C)
    x, y = rows.to(dtype), columns.to(dtype)
    calls = {
        method: lambda method=method: _METHODS[method](x, y, pattern, torch.float32, TRANSIENT_BYTES)
        for method in _METHODS
    }
    ratios = medians(calls | {"floor": lambda: rows.t() @ columns}, "floor", arguments.rounds)
    del ratios["floor"]
    return {
        "rows": R,
        "columns": C,
        "density": density,
        "granularity": granularity,
        "dtype": str(dtype).removeprefix("torch."),
        "count": selection.count,
        "ratios": {method: round(ratio, 4) for method, ratio in ratios.items()},
        "chosen": cheaper_method(N, R, C, selection.count),
        "best": min(ratios, key=ratios.__getitem__),
    }


def fitted(measured: list[dict], N: int) -> dict[str, float]:
    """TRANSPOSE_COST and DOT_COST of cheaper_method, by least squares of the relative errors."""
    parts = [[N * (row["rows"] + row["columns"]), N * row["count"]] for row in measured]
    costs = torch.tensor([row["ratios"]["sampled"] * N * row["rows"] * row["columns"] for row in measured])
    matrix = torch.tensor(parts, dtype=torch.float64) / costs[:, None]
    solution = torch.linalg.lstsq(matrix, torch.ones(len(measured), 1, dtype=torch.float64)).solution
    return {
        name: round(x, 2) for name, x in zip(("TRANSPOSE_COST", "DOT_COST"), solution.flatten().tolist(), strict=True)
    }


def measure_indices(R: int, C: int, density: float, granularity: int, arguments: argparse.Namespace) -> dict:
    """The time of making the pattern and of writing the deltas, relative to one gradient in float32."""
    selection = draw_of(R, C, density, granularity)
    stored = strips_of(selection)
    rows, columns = torch.randn(arguments.tokens, R), torch.randn(arguments.tokens, C)

    def pattern(strip_indices: torch.Tensor) -> Pattern:
        return Pattern(strip_indices, R, C, granularity)

    weight, base, delta = torch.zeros(R, C), torch.zeros(selection.count), torch.ones(selection.count)

    def write(strip_indices: torch.Tensor) -> None:
        cpu.loaded_operators(weight).write_deltas(weight, base, delta, strip_indices, C, granularity)

    once = pattern(stored)
    calls = {
        "gradient": lambda: _METHODS["sampled"](rows, columns, once, torch.float32, TRANSIENT_BYTES),
        "stored": lambda: (pattern(stored), write(stored)),
        "regenerated": lambda: (pattern(strips_of(selection)), write(strips_of(selection))),
    }
    ratios = medians(calls, "gradient", arguments.rounds)
    return {"rows": R, "columns": C, "density": density, "granularity": granularity} | {
        name: round(ratios[name], 4) for name in ("stored", "regenerated")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["768x768", "2048x768", "2048x2048", "4096x4096"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01, 0.05, 0.1, 0.2])
    parser.add_argument("--granularities", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    cases = [(R, C, d, g) for R, C in sizes for g in arguments.granularities for d in arguments.densities]
    assert cpu.load_operator(), "there is nothing to measure but dense products"
    print(f"{device_name()}, {arguments.tokens} tokens, {arguments.rounds} rounds; 1 = the dense product in float32")
    head = f"{'weight':<12} {'g':>3} {'density':>8}"
    print(f"{head} {'dtype':<9} {'sampled':>8} {'dense':>8}   chosen   best")
    measured = []
    for R, C, density, granularity in cases:
        for dtype in arguments.dtypes:
            row = measure(R, C, density, granularity, getattr(torch, dtype), arguments)
            measured.append(row)
            cells = " ".join(f"{row['ratios'][method]:>8.3f}" for method in _METHODS)
            case = f"{f'{R} x {C}':<12} {granularity:>3} {density:>8.2%} {dtype:<9}"
            print(f"{case} {cells}   {row['chosen']:<8} {row['best']}", flush=True)
    constants = fitted(measured, arguments.tokens)
    print(f"fitted constants: {', '.join(f'{name} {value}' for name, value in constants.items())}")
    print(f"\n{head} {'stored':>8} {'regenerated':>12}   parts of the gradient")
    indices = [measure_indices(*case, arguments) for case in cases]
    for row in indices:
        size = f"{row['rows']} x {row['columns']}"
        case = f"{size:<12} {row['granularity']:>3} {row['density']:>8.2%}"
        print(f"{case} {row['stored']:>8.3f} {row['regenerated']:>12.3f}")
    if arguments.json:
        found = {"arguments": vars(arguments) | {"json": None}, "rows": measured, "fitted": constants}
        arguments.json.write_text(json.dumps(found | {"indices": indices}, indent=2))


if __name__ == "__main__":
    main()
