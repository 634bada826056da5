"""How time and memory scale with the density, with the size of the model, and with the number of ranks.

    python benchmarks/scaling.py                    all three; scaling.json, a page and a plot in benchmarks/results
    python benchmarks/scaling.py --what density     only the density; keeps the other results
    python benchmarks/scaling.py --plot             no runs: page and plot again from the JSON

Density and size: steps in turns with forward and backward of the frozen model, as in step_time.py. Ranks: the bytes of
each rank and the time of its optimizer. Ranks on one machine share its cores and train no faster than one rank, so the
time of a step is not shown for them. The time of the optimizer, for n / ranks scalars, decreases.
"""

import argparse
import copy
import gc
import statistics
from pathlib import Path
from typing import Any

import torch
from many_ranks import largest, run
from methods import SHAPES, TARGETS, Budget, llama, llama_config, prepare, sparse, trained_parameters, training_step
from tables import RESULTS, Row, mebibytes, read, spread, table, write
from torch import nn
from transformers import PreTrainedModel
from turns import in_turns, ratio

from sparse_zero import SparseConfig, sparsify
from sparse_zero.training.device import device_name

DENSITIES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
MODELS = ("llama-20m", "llama-60m", "llama-120m", "llama-350m")
RANKS, STAGES = (1, 2, 4), ("zero2", "zero3")


def over_density(arguments: argparse.Namespace) -> list[Row]:
    """Models of all densities in turns. Densities are fractions of the targets."""
    base = _base(arguments, arguments.model)
    budget = Budget.of(base, TARGETS[arguments.targets], DENSITIES[0])
    models = {}
    for density in DENSITIES:
        of_model = density * budget.target_scalars / budget.model_scalars
        models[density] = sparsify(copy.deepcopy(base), SparseConfig(density=of_model, targets=budget.targets))
    return [{"density": density} | row for density, row in _against_frozen(arguments, base, models).items()]


def over_size(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for name in arguments.models:
        base = _base(arguments, name)
        budget = Budget.of(base, TARGETS[arguments.targets], arguments.density)
        found = _against_frozen(arguments, base, {name: sparse(copy.deepcopy(base), budget)})
        rows.append({"model": name, "scalars": budget.model_scalars} | found[name])
        del base
        gc.collect()
    return rows


def over_ranks(arguments: argparse.Namespace) -> list[Row]:
    names = ("model", "targets", "dtype", "density", "device")
    options = {name: getattr(arguments, name) for name in names} | {"tokens": arguments.tokens_of_rank}
    return [run("sparse", way, count, options) for way in STAGES for count in RANKS]


SCALES = {"density": over_density, "size": over_size, "ranks": over_ranks}


def _base(arguments: argparse.Namespace, name: str) -> PreTrainedModel:
    return llama(llama_config(name), getattr(torch, arguments.dtype), arguments.device)


def _against_frozen(
    arguments: argparse.Namespace, base: PreTrainedModel, models: dict[Any, nn.Module]
) -> dict[Any, Row]:
    ids = torch.randint(base.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(arguments.device)
    floor = prepare("frozen", base, Budget.of(base, None, arguments.density))
    steps = {"frozen": training_step(floor, ids)} | {key: training_step(model, ids) for key, model in models.items()}
    seconds = in_turns(steps, arguments.rounds, arguments.device)
    return {
        key: {
            "trainable": sum(p.numel() for p in trained_parameters(model)),
            "seconds": seconds[key],
            "frozen_seconds": seconds["frozen"],
            "over_frozen": ratio(seconds[key], seconds["frozen"]),
        }
        for key, model in models.items()
    }


# ---- page and plot


def page(results: list[Row]) -> str:
    return "\n\n".join(["# Scaling", *(_section(result) for result in results)])


def _section(result: Row) -> str:
    settings, what = result["settings"], result["what"]
    about = f"{result['machine']}, {settings['targets']}, {settings['dtype']}, "
    if what == "ranks":
        return "\n\n".join(
            [
                "## Ranks",
                f"{about}{settings['model']}, {settings['density']:.2%}, {settings['tokens_of_rank']} tokens for each "
                "rank, all on one machine; MiB and ms, of the rank that has most.",
                _table_of_ranks(result["rows"]),
            ]
        )
    about += f"{settings['tokens']:,} tokens, {settings['rounds']} rounds; medians [quartiles]"
    if what == "density":
        rows = [[f"{row['density']:.2%}", *_timed(row)] for row in result["rows"]]
        return "\n\n".join(["## Density", f"{about}; {settings['model']}.", table(["density", *TIMED], rows)])
    rows = [[row["model"], f"{row['scalars']:,}", *_timed(row)] for row in result["rows"]]
    header = ["model", "scalars", *TIMED]
    return "\n\n".join(["## Size", f"{about}; {settings['density']:.2%} of the targets.", table(header, rows)])


TIMED = ("trainable", "s / step", "/ frozen")


def _timed(row: Row) -> list[str]:
    return [f"{row['trainable']:,}", f"{statistics.median(row['seconds']):.3f}", spread(row["over_frozen"])]


def _table_of_ranks(runs: list[Row]) -> str:
    rows = []
    for row in runs:
        if "failure" in row:
            rows.append([row["way"], str(row["count"]), row["failure"], *[""] * 5])
            continue
        n, optimizer = row["ranks"][0]["scalars"], largest(row, "optimizer")
        rows.append(
            [
                row["way"],
                str(row["count"]),
                mebibytes(optimizer),
                f"{optimizer / (12 * n / row['count']):.4f}",
                mebibytes(largest(row, "weights")),
                mebibytes(largest(row, "indices") + largest(row, "originals") + largest(row, "trained")),
                mebibytes(largest(row, "peak")),
                f"{1e3 * largest(row, 'optimizer_seconds'):.1f}",
            ]
        )
    header = ["stage", "ranks", "optimizer", "/ (12 n / ranks)", "weights", "replicated", "peak", "AdamW, ms"]
    return table(header, rows)


def plot(results: list[Row], figure: Any) -> None:
    figure.set_size_inches(4.2 * len(results), 3.6)
    for panel, result in zip(figure.subplots(1, len(results), squeeze=False).flat, results, strict=True):
        if result["what"] == "ranks":
            for way in STAGES:
                runs = [row for row in result["rows"] if row["way"] == way and "ranks" in row]
                bytes_of_rank = [largest(row, "optimizer") / 2**20 for row in runs]
                panel.plot([row["count"] for row in runs], bytes_of_rank, marker="o", label=way)
            panel.set_xticks(RANKS, [str(count) for count in RANKS])
            panel.set_ylim(bottom=0)
            panel.set_ylabel("optimizer state of a rank, MiB")
            panel.set_xlabel("ranks")
            panel.legend()
            continue
        rows = result["rows"]
        x = [100 * row["density"] if result["what"] == "density" else row["scalars"] / 1e6 for row in rows]
        middle = [row["over_frozen"]["median"] for row in rows]
        low = [row["over_frozen"]["median"] - row["over_frozen"]["lower"] for row in rows]
        high = [row["over_frozen"]["upper"] - row["over_frozen"]["median"] for row in rows]
        panel.errorbar(x, middle, [low, high], marker="o", capsize=3)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_ylabel("step / frozen forward and backward")
        panel.set_xlabel(
            "density of the targets, %" if result["what"] == "density" else "scalars of the model, millions"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--model", choices=SHAPES, default="llama-120m", help="for density and ranks")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(MODELS), help="for size")
    parser.add_argument("--targets", choices=TARGETS, default="all-linear")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--density", type=float, default=0.01, help="fraction of the targets, for size and ranks")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--tokens-of-rank", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "scaling.json", help="page and plot go to the same directory"
    )
    parser.add_argument("--plot", action="store_true", help="no runs: only page and plot of the existing results")
    arguments = parser.parse_args()
    results = {result["what"]: result for result in read(arguments.json)}
    for what in [] if arguments.plot else arguments.what:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "plot", "what")}
        rows = SCALES[what](arguments)
        results[what] = {"what": what, "settings": settings, "machine": device_name(), "rows": rows}
        gc.collect()
        kept = [results[name] for name in SCALES if name in results]
        write(arguments.json, kept, page, plot)
        print(_section(results[what]), flush=True)
    if arguments.plot:
        write(arguments.json, list(results.values()), page, plot)
        print(page(list(results.values())))


if __name__ == "__main__":
    main()
