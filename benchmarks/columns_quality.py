"""Scattered scalars, scalars in a tenth of the columns, and whole columns: their accuracy, and the best learning rate.

    python benchmarks/columns_quality.py             whatever runs are missing; columns_quality.jsonl
    python benchmarks/columns_quality.py --limit 1   one of them
    python benchmarks/columns_quality.py --others    also the rates at 0.5% and 10%
    python benchmarks/columns_quality.py --table     no runs: the page again

MiniLM-L6 on Rotten Tomatoes, as in noise_quality.py: all linear layers; the same training and test sentences, order
and head for all methods of a seed. Each method uses the learning rate with the best accuracy on validation sentences,
with a seed of its own for tuning; where two rates are within a point, a second seed decides. The five seeds are tested
at one share of the scalars, in bfloat16 autocast, which takes half the time of float32: those of scattered scalars are
runs of noise_quality.py. `--others` adds the tuning at other shares. Each run is one line of the file, so that an
interrupted call can be repeated, and several calls share the runs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from noise_quality import append_row, claim, read_lines, train_and_measure
from noise_quality_plan import EPOCHS, SEEDS, TUNING_SEEDS, TUNING_SIZE, Row, Run, best, key_of
from noise_quality_table import percent, points
from tables import RESULTS, table
from transformers.utils import logging

from sparse_zero import SparseConfig, sparsify

COLUMNS: tuple[float | str, ...] = (1, 0.1, "whole")
DENSITIES = (0.005, 0.02, 0.1)
TESTED = 0.02
RATES = (1e-3, 3e-3, 1e-2)
SECOND_SEED, CLOSE = 101, 0.01
CACHE, NOISE_RUNS = RESULTS / "columns_quality.jsonl", RESULTS / "noise_quality.jsonl"
NAMES = {"1": "scattered", "0.1": "within a tenth of the columns", "whole": "whole columns"}

Key = tuple[str, str]
Done = dict[Key, Row]


def run_of(density: float, rate: float, seed: int, split: Any) -> Run:
    size, precision = TUNING_SIZE, "float32" if split == "validation" and seed in TUNING_SEEDS else "bfloat16"
    return Run("columns", "none", None, rate, size, EPOCHS[size], seed, split, precision=precision, density=density)


def tuning_runs(density: float, seeds: tuple[int, ...] = TUNING_SEEDS) -> list[Run]:
    return [run_of(density, rate, seed, "validation") for seed in seeds for rate in RATES]


def deciding_runs(columns: float | str, done: Done) -> list[Run]:
    """The runs of a second seed at the rates that are within CLOSE of the best one; none if there is only that."""
    rows = [done[str(columns), run.key] for run in tuning_runs(TESTED) if (str(columns), run.key) in done]
    highest = max((row["accuracy"] for row in rows), default=0)
    close = [row["learning_rate"] for row in rows if highest - row["accuracy"] < CLOSE]
    return [run_of(TESTED, rate, SECOND_SEED, "validation") for rate in close] if len(close) > 1 else []


def chosen(columns: float | str, done: Done) -> Run | None:
    """A tuning run with the best rate; None while one is missing."""
    of_method = {key: row for (name, key), row in done.items() if name == str(columns)}
    first, deciding = tuning_runs(TESTED), deciding_runs(columns, done)
    if any(run.key not in of_method for run in first):
        return None
    if not deciding:
        return best(first, of_method)
    rates = {run.learning_rate for run in deciding}
    return best([run for run in first if run.learning_rate in rates] + deciding, of_method)


def plan(done: Done, others: bool) -> list[tuple[float | str, Run]]:
    """The tuning runs of the tested share, the test runs seed by seed, and the tuning runs of the other shares, which
    need 1 and whole columns only: a tenth of the columns cannot hold a tenth of the scalars.
    """
    first = [(columns, run) for run in tuning_runs(TESTED) for columns in COLUMNS]
    first += [(columns, run) for columns in COLUMNS for run in deciding_runs(columns, done)]
    rates = {columns: run.learning_rate for columns in COLUMNS if (run := chosen(columns, done))}
    tests = [(columns, run_of(TESTED, rate, seed, "test")) for seed in SEEDS for columns, rate in rates.items()]
    further = [(c, run) for d in DENSITIES if d != TESTED for run in tuning_runs(d) for c in (1, "whole")]
    return [*first, *tests, *(further if others else [])]


def finished(path: Path) -> Done:
    """The runs of the file, and those of noise_quality.py without noise: the same training of scattered scalars."""
    done = {}
    for row in read_lines(NOISE_RUNS):
        if row["method"] == "sparse" and row["noise"] == "none" and row["size"] == TUNING_SIZE:
            row = row | {"columns": "1", "method": "columns"}
            done[row["columns"], key_of(row)] = row
    return done | {(row["columns"], key_of(row)): row for row in read_lines(path)}


def add_missing_runs(limit: int | None, device: str, others: bool) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    added = 0
    while added != limit:
        done = finished(CACHE)
        missing = [(columns, run) for columns, run in plan(done, others) if (str(columns), run.key) not in done]
        if not missing:
            return
        for columns, run in missing:
            held = claim(Path(f"{CACHE}-{columns}"), run)
            if held is None:
                continue
            with held:
                if (str(columns), run.key) not in finished(CACHE):
                    _add_run(columns, run, device)
                    added += 1
            break
        else:
            time.sleep(5)  # another call works on all of them; what it finds may settle the next


def _add_run(columns: float | str, run: Run, device: str) -> None:
    def adapt(model: Any, run: Run) -> Any:
        return sparsify(model, SparseConfig(density=run.density, targets="all-linear", seed=run.seed, columns=columns))

    row = {"columns": str(columns)} | train_and_measure(run, device, adapt=adapt)
    append_row(CACHE, row)
    print(
        f"{time.strftime('%H:%M:%S')} columns {columns} density {run.density:g} rate {run.learning_rate:g} seed "
        f"{run.seed} {run.split} {row['accuracy']:.4f} loss {row['loss']:.4f} {row['cpu_seconds']:.0f} s of CPU",
        flush=True,
    )


def page(done: Done) -> str:
    return "\n\n".join(
        [
            "# Random columns: accuracy and learning rates",
            "MiniLM-L6 on Rotten Tomatoes, all linear layers, 1,000 training sentences, two epochs, batches of 16, "
            "AdamW. Made by `python benchmarks/columns_quality.py` on "
            + ", ".join(sorted({row["device"] for row in done.values()}))
            + ".",
            "## Test accuracy",
            f"{TESTED:.0%} of the model's scalars, 1,000 test sentences, bfloat16, each method at its best rate; "
            "percent, mean ± standard deviation over the seeds; paired difference to scattered scalars, mean ± "
            "standard error.",
            _tested(done),
            "## Validation accuracy by learning rate",
            "1,000 validation sentences, percent; - : not run. float32; where two rates are within a point, a second "
            "seed (in bfloat16) stands behind the comma.",
            _tuned(done),
        ]
    )


def _tested(done: Done) -> str:
    found: dict[str, dict[int, float]] = {str(columns): {} for columns in COLUMNS}
    examples: dict[str, Row] = {}
    for (columns, _), row in done.items():
        if row["split"] == "test" and row["precision"] == "bfloat16":
            found[columns][row["seed"]] = row["accuracy"]
            examples[columns] = row
    rows = []
    for columns, scores in found.items():
        if scores:
            rows.append(
                [
                    NAMES[columns],
                    f"{examples[columns]['trainable']:,}",
                    f"{examples[columns]['learning_rate']:g}",
                    str(len(scores)),
                    percent(scores.values()),
                    "" if columns == "1" else points(scores, found["1"]),
                ]
            )
    return table(["scalars", "trainable", "rate", "seeds", "accuracy", "- scattered"], rows)


def _tuned(done: Done) -> str:
    rows = []
    for density in DENSITIES:
        for columns in COLUMNS:
            scores = [done.get((str(columns), run.key)) for run in tuning_runs(density)]
            if any(scores):
                cells = ["-" if row is None else f"{100 * row['accuracy']:.1f}" for row in scores]
                if density == TESTED:
                    for run in deciding_runs(columns, done):
                        if row := done.get((str(columns), run.key)):
                            cells[RATES.index(run.learning_rate)] += f", {100 * row['accuracy']:.1f}"
                rows.append([f"{density:.1%}", NAMES[str(columns)], *cells])
    return table(["share", "scalars", *(f"{rate:g}" for rate in RATES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="runs of this call")
    parser.add_argument("--others", action="store_true", help="also the learning rates at other shares")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--table", action="store_true", help="no runs: the page again")
    arguments = parser.parse_args()
    if not arguments.table:
        add_missing_runs(arguments.limit, arguments.device, arguments.others)
    text = page(finished(CACHE))
    CACHE.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
