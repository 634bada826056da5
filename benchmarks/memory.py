"""Memory of each rank during training, by purpose: ours and every peer, each in separate processes.

    python benchmarks/memory.py                          1, 2 and 4 ranks; memory.json, a page and a plot in results
    python benchmarks/memory.py --ranks 1 --methods frozen sparse lora --json memory_1.json
    python benchmarks/memory.py --plot                   no runs: page and plot again from the JSON

The figures are allocations by torch, not pages; on a CPU, resident memory is listed in addition. On one rank all
methods use plain torch; on several, ours uses ZeRO 2 and 3, LoRA and full fine-tuning use these and DDP, the other
peers DDP. Results that exist are not measured again.

weights       of the base model, on this rank
trained       the parameters that a method adds and trains
optimizer     its moments, and under ZeRO its float32 values
indices       the positions of the selected scalars; originals: their pretrained values
other         gradient buckets and the like, the batch
activations   what forward saves for backward; under ZeRO 3 also the weights that are still gathered: all weights of a
              model that is smaller than DeepSpeed's stage3_max_live_parameters
transient     the peak of the step, beyond all these after forward
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from many_ranks import largest, run
from methods import METHODS, OURS, SHAPES, TARGETS
from tables import RESULTS, Row, mebibytes, read, table, write

from sparse_zero.gradient.sampled import TRANSIENT_BYTES
from sparse_zero.training.device import device_name

PARTS = ("weights", "trained", "optimizer", "indices", "originals", "other", "activations", "transient")
WAYS = {"sparse": ("zero2", "zero3"), "sparse-16": ("zero2", "zero3"), "lora": ("ddp", "zero2", "zero3")}
WAYS |= {"full": WAYS["lora"]}


def planned(methods: list[str], ranks: list[int]) -> list[tuple[str, str, int]]:
    """(method, way to train, number of ranks)"""
    runs = []
    for count, method in itertools.product(ranks, methods):
        if count == 1:
            runs.append((method, "plain", 1))
        elif method != "frozen":
            runs += [(method, way, count) for way in WAYS.get(method, ("ddp",))]
    return runs


def page(results: list[Row]) -> str:
    return "\n\n".join(["# Memory of each rank", *(_section(row) for row in results)])


def _section(result: Row) -> str:
    options = result["options"]
    rows = [
        [
            row["method"],
            str(row["count"]),
            row["way"],
            f"{largest(row, 'scalars'):,}",
            *(mebibytes(largest(row, part)) for part in PARTS),
            mebibytes(largest(row, "peak")),
            mebibytes(largest(row, "resident")),
        ]
        for row in result["runs"]
        if "ranks" in row
    ]
    failures = [
        f"- {row['method']}, {row['count']} ranks, {row['way']}: {row['failure']}"
        for row in result["runs"]
        if "failure" in row
    ]
    header = ["method", "ranks", "way", "trainable", *PARTS, "peak", "resident"]
    return "\n\n".join(
        [
            f"## {options['model']}, {options['targets']}, {options['dtype']}",
            f"{result['machine']}, torch {result['torch']}, one sequence of {options['tokens']:,} tokens for each "
            f"rank, {options['density']:.2%} of the targets. MiB of the rank with the most; resident: the growth of "
            "the process within a step.",
            table(header, rows),
            *(["Did not run:\n\n" + "\n".join(failures)] if failures else []),
            table(["ours", "ranks", "way", *CHECKS], [checks(row) for row in result["runs"] if _is_ours(row)]),
        ]
    )


CHECKS = (
    "optimizer / (12 n / ranks)",
    "bytes replicated per scalar",
    "of these trained, indices, originals",
    "transient of one gradient, of its bound",
)


def _is_ours(row: Row) -> bool:
    return row["method"] in OURS and "ranks" in row


def checks(row: Row) -> list[str]:
    """The figures that this project promises. On one rank plain torch stores only the moments: the float32 values are
    the trained parameters themselves.
    """
    n = row["ranks"][0]["scalars"]
    state = largest(row, "optimizer") + (largest(row, "trained") if row["way"] == "plain" else 0)
    parts = [largest(row, part) / n for part in ("trained", "indices", "originals")]
    transient = largest(row, "gradient_transient")
    return [
        row["method"],
        str(row["count"]),
        row["way"],
        f"{state / (12 * n / row['count']):.4f}",
        f"{sum(parts):.2f}",
        ", ".join(f"{part:.2f}" for part in parts),
        f"{mebibytes(transient)} MiB, {transient / TRANSIENT_BYTES:.0%}" if transient is not None else "",
    ]


def plot(results: list[Row], figure: Any) -> None:
    """The memory of each method in addition to the base model's weights: a panel for each number of ranks."""
    runs = [row for row in results[-1]["runs"] if "ranks" in row]
    if not runs:
        return
    counts = sorted({row["count"] for row in runs})
    figure.set_size_inches(5 * len(counts), 4.5)
    for panel, count in zip(figure.subplots(1, len(counts), squeeze=False).flat, counts, strict=True):
        shown = [row for row in reversed(runs) if row["count"] == count]
        names = [row["method"] if row["way"] == "plain" else f"{row['method']}, {row['way']}" for row in shown]
        left = [0.0] * len(shown)
        for part in PARTS:
            widths = [largest(row, part) / 2**20 for row in shown]
            panel.barh(names, widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        panel.set_title(f"{count} rank{'s' if count > 1 else ''}")
        panel.set_xlabel("MiB on a rank at the largest moment")
    figure.axes[0].legend(fontsize="x-small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model", choices=SHAPES, default="llama-120m")
    parser.add_argument("--targets", choices=TARGETS, default="all-linear")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "memory.json", help="page and plot go to the same directory"
    )
    parser.add_argument("--plot", action="store_true", help="no runs: only page and plot of the existing results")
    arguments = parser.parse_args()
    results = read(arguments.json)
    for dtype in [] if arguments.plot else arguments.dtypes:
        names = ("model", "targets", "density", "tokens", "device")
        options = {name: getattr(arguments, name) for name in names} | {"dtype": dtype}
        result = next((result for result in results if result["options"] == options), None)
        if result is None:
            result = {"options": options, "machine": device_name(), "torch": torch.__version__, "runs": []}
            results.append(result)
        done = {(row["method"], row["way"], row["count"]) for row in result["runs"]}
        for method, way, count in planned(arguments.methods, arguments.ranks):
            if (method, way, count) not in done:
                result["runs"].append(run(method, way, count, options))
                print(f"{method}, {way}, {count} ranks: {result['runs'][-1].get('failure', 'done')}", flush=True)
                write(arguments.json, results, page, plot)
    write(arguments.json, results, page, plot)
    print(page(results))


if __name__ == "__main__":
    main()
