"""What does a random subset lose at which share? Against drawn columns, LoRA with as many scalars, full and the head.

    python benchmarks/share_quality.py --data cola --seconds 3600            what is missing, by worth
    python benchmarks/share_quality.py --tasks rotten-tomatoes               the task that needs no --data
    python benchmarks/share_quality.py --data cola --size 500 --epochs 2     a smaller experiment
    python benchmarks/share_quality.py --list
    python benchmarks/share_quality.py --table                               no runs: page and plot again

MiniLM-L6 on Rotten Tomatoes (accuracy) and CoLA (Matthews correlation), all linear layers, as in noise_quality.py: the
classification head is trained too, and is part of every share. LoRA has the rank whose number of scalars is nearest
and lora_alpha of twice the rank; at 0.1%, which is less than rank 1 on all linear layers, it is on those of the
attention. Each method has at each share the learning rate that is best on validation sentences, with a seed of its
own: one of three, or one of up to two more where the best is at the edge; where two are close a second seed decides.
Drawn columns are tested at the rate of scattered scalars until all else is there: then they are tuned too, and
tested again where that chooses another rate. Each run is one line of results/share_quality.jsonl: an interrupted call
can be repeated, and several calls share the runs. Runs of a seed share training sentences, head, order and positions.
"""

import argparse
import datetime
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import cola
import torch
import transformers
from lora_quality import lora
from noise_quality import append_row, claimed, device_name, read_lines, reviews, train_and_measure
from share_quality_plan import (
    DRAWN,
    FULL,
    FULL_SCALE,
    HEAD,
    LORA,
    METRICS,
    SCATTERED,
    TASKS,
    Row,
    Run,
    Scale,
    key_of,
    plan,
)
from share_quality_table import write_page
from tables import RESULTS
from transformers.utils import logging

from sparse_zero import SparseConfig, UserError, sparsify
from sparse_zero.selection.targets import find_modules_to_save, parameter_names

CACHE = RESULTS / "share_quality.jsonl"
ATTENTION = ["query", "key", "value", "attention.output.dense"]
ALPHA_OF_RANK = 2
SMALLEST_OF_ALL_LAYERS = 0.002
"""The share of rank 1 on all linear layers."""


def adapted(model: Any, run: Run) -> Any:
    """The model with what the run trains trainable, the rest frozen."""
    if run.method == FULL:
        return model
    if run.method == LORA:
        targets = ATTENTION if run.density < SMALLEST_OF_ALL_LAYERS else "all-linear"
        return lora(model, run, targets, ALPHA_OF_RANK)
    config = SparseConfig(targets="all-linear")
    if run.method == HEAD:
        names = parameter_names(model, find_modules_to_save(model, config))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return model
    columns = 1 if run.method == SCATTERED else DRAWN[run.method]
    return sparsify(model, SparseConfig(density=run.density, targets="all-linear", seed=run.seed, columns=columns))


def make_run(run: Run, directory: Path | None, device: str) -> Row:
    """Train and evaluate once. Returns: the line of the results."""
    sentences = reviews if run.task == "rotten-tomatoes" else partial(cola.sentences, directory=directory)
    row = train_and_measure(run, device, adapt=adapted, sentences=sentences)
    return row | {
        "score": row[METRICS[run.task]],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def read_results(path: Path = CACHE) -> dict[str, Row]:
    """The finished runs by their keys."""
    return {key_of(row): row for row in read_lines(path)}


def seconds_of(run: Run, done: dict[str, Row], device: str) -> float:
    """An estimate from the last runs of the task on this device."""
    here = [row for row in done.values() if (row["device"], row["task"]) == (device, run.task)]
    passes = run.size * run.epochs
    return max((row["seconds"] / (row["size"] * row["epochs"]) * passes for row in here[-5:]), default=0.0)


def make_runs(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end, device = time.monotonic() + arguments.seconds, device_name(arguments.device)
    scale = Scale(arguments.size, arguments.epochs)

    def missing() -> list[Run]:
        done = read_results()
        return [run for run in plan(done, scale, arguments.tasks) if run.key not in done]

    for run in claimed(CACHE, missing):
        if time.monotonic() + seconds_of(run, read_results(), device) > end:
            print(f"{len(missing())} runs are missing; the next may not fit into what is left of the time")
            return
        row = make_run(run, arguments.data, arguments.device)
        append_row(CACHE, row)
        _say(row)
    print("nothing is missing")


def _say(row: Row) -> None:
    print(
        f"{time.strftime('%H:%M:%S')} {row['task']} {row['method']} {row['density']:g} ({row['trainable']:,}) rate "
        f"{row['learning_rate']:g} seed {row['seed']} {row['split']} {row['score']:.4f} loss {row['loss']:.4f} "
        f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of CoLA's files")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before a run that may take longer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument(
        "--size", type=int, default=FULL_SCALE.size, help="training sentences; CoLA has four times as many"
    )
    parser.add_argument("--epochs", type=int, default=FULL_SCALE.epochs)
    parser.add_argument("--list", action="store_true", help="no runs: which are known, and which of them are missing")
    parser.add_argument("--table", action="store_true", help="no runs: page and plot again")
    arguments = parser.parse_args()
    if arguments.list:
        done = read_results()
        for run in plan(done, Scale(arguments.size, arguments.epochs), arguments.tasks):
            print("done   " if run.key in done else "missing", run.key)
        return 0
    if not arguments.table:
        if arguments.data is None and "cola" in arguments.tasks:
            parser.error("--data: name the folder of CoLA's files, or --tasks rotten-tomatoes")
        try:
            make_runs(arguments)
        except UserError as error:
            parser.error(str(error))
    print(write_page(read_results(), CACHE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
