"""Random scalars against the largest weights and the largest gradients: test accuracy on Rotten Tomatoes.

    python benchmarks/selection_quality.py --seconds 3600   whatever runs are missing; selection_quality.jsonl
    python benchmarks/selection_quality.py --table          no runs: the page again

MiniLM-L6, 2% of the scalars in all linear layers, 1,000 training sentences, as in noise_quality.py, whose runs without
noise are those of random scalars. Each rule uses the learning rate with the best accuracy on validation sentences,
with a seed of its own. Gradients are those of 64 training sentences. One rule after the other, each run one line of
the file, so that an interrupted call can be repeated.
"""

import argparse
import datetime
import time
from typing import Any

import torch
from columns_quality import Done
from noise_quality import append_row, collate, encoded_sentences, read_lines, train_and_measure
from noise_quality_plan import EPOCHS, SEEDS, TUNING_SEEDS, TUNING_SIZE, Row, Run, best, key_of, sentences_of
from noise_quality_table import percent, points
from tables import RESULTS, table
from transformers.utils import logging

from sparse_zero import SparseConfig, sparsify

RULES = ("gradient", "snip", "magnitude")
RANDOM = "stratified"
RATES = (1e-3, 3e-3)
"""1e-2 collapses with random scalars."""
EXAMPLES, BATCH = 64, 16
CACHE, NOISE_RUNS = RESULTS / "selection_quality.jsonl", RESULTS / "noise_quality.jsonl"


def run_of(rate: float, seed: int, split: Any) -> Run:
    return Run("selection", "none", None, rate, TUNING_SIZE, EPOCHS[TUNING_SIZE], seed, split)


def tuning_runs() -> list[Run]:
    return [run_of(rate, seed, "validation") for seed in TUNING_SEEDS for rate in RATES[::-1]]


def chosen(rule: str, done: Done) -> Run | None:
    """A tuning run with the best rate; None while one is missing."""
    return best(tuning_runs(), {key: row for (name, key), row in done.items() if name == rule})


def plan(done: Done) -> list[tuple[str, Run]]:
    """One rule after the other: its tuning runs, then its tests."""
    runs = []
    for rule in RULES:
        runs += [(rule, run) for run in tuning_runs()]
        if found := chosen(rule, done):
            runs += [(rule, run_of(found.learning_rate, seed, "test")) for seed in SEEDS]
    return runs


def finished() -> Done:
    """The runs of the file, and those of noise_quality.py without noise: random scalars."""
    done = {}
    for row in read_lines(NOISE_RUNS):
        if row["method"] == "sparse" and row["noise"] == "none" and row["size"] == TUNING_SIZE:
            row = row | {"selection": RANDOM, "method": "selection"}
            done[RANDOM, key_of(row)] = row
    return done | {(row["selection"], key_of(row)): row for row in read_lines(CACHE)}


def add_missing_runs(device: str, seconds: float) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end, longest = time.monotonic() + seconds, 0.0
    while True:
        done = finished()
        missing = [(rule, run) for rule, run in plan(done) if (rule, run.key) not in done]
        if not missing or time.monotonic() + longest > end:
            print(f"{len(missing)} of the runs that are known are missing")
            return
        rule, run = missing[0]
        row = {"selection": rule} | train_and_measure(run, device, adapt=_adapt(rule, device))
        longest = max(longest, row["seconds"])
        append_row(CACHE, row | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()})
        print(
            f"{time.strftime('%H:%M:%S')} {rule} rate {run.learning_rate:g} seed {run.seed} {run.split} "
            f"{row['accuracy']:.4f} loss {row['loss']:.4f} {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )


def _adapt(rule: str, device: str) -> Any:
    def adapt(model: Any, run: Run) -> Any:
        config = SparseConfig(density=run.density, targets="all-linear", seed=run.seed, selection=rule)
        if not config.uses_gradients:
            return sparsify(model, config)
        ids, labels = encoded_sentences(run.base_model, run.max_length)
        training = sentences_of(run, len(ids))[0][:EXAMPLES]
        parts = [training[start : start + BATCH] for start in range(0, EXAMPLES, BATCH)]
        return sparsify(model, config, batches=[collate(part, ids, labels, device) for part in parts])

    return adapt


def page(done: Done) -> str:
    dates = sorted({row["date"] for row in done.values() if "date" in row})
    devices = ", ".join(sorted({row["device"] for row in done.values()}))
    return "\n\n".join(
        [
            "# Which scalars: test accuracy",
            "MiniLM-L6 on Rotten Tomatoes, 2% of the scalars in all linear layers, 1,000 training and 1,000 test "
            "sentences, two epochs, batches of 16, AdamW, bfloat16. Percent, mean ± standard deviation over seeds; "
            "paired difference to random scalars, mean ± standard error. Made by `python "
            f"benchmarks/selection_quality.py` on {devices}, {' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))}; "
            "the runs of random scalars by `python benchmarks/noise_quality.py`.",
            _tested(done),
            "## Validation accuracy by learning rate",
            "One seed, 1,000 validation sentences, percent; - : not run.",
            _tuned(done),
        ]
    )


def _tested(done: Done) -> str:
    rows, found, rates = [], {rule: _scores(rule, done) for rule in (RANDOM, *RULES)}, {}
    for (rule, _), row in done.items():
        if row["split"] == "test":
            rates[rule] = row["learning_rate"]
    for rule, scores in found.items():
        if scores:
            rows.append(
                [
                    "random (stratified)" if rule == RANDOM else rule,
                    f"{rates[rule]:g}",
                    str(len(scores)),
                    percent(scores.values()),
                    "" if rule == RANDOM else points(scores, found[RANDOM]),
                ]
            )
    return table(["selection", "rate", "seeds", "accuracy", "- random"], rows)


def _scores(rule: str, done: Done) -> dict[int, float]:
    rows: list[Row] = [row for (name, _), row in done.items() if name == rule and row["split"] == "test"]
    return {row["seed"]: row["accuracy"] for row in rows}


def _tuned(done: Done) -> str:
    rows = []
    for rule in (RANDOM, *RULES):
        runs = {run.learning_rate: done.get((rule, run.key)) for run in tuning_runs()}
        if any(runs.values()):
            cells = [f"{100 * row['accuracy']:.1f}" if (row := runs[rate]) else "-" for rate in RATES]
            rows.append(["random (stratified)" if rule == RANDOM else rule, *cells])
    return table(["selection", *(f"{rate:g}" for rate in RATES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before a run that may take longer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--table", action="store_true", help="no runs: the page again")
    arguments = parser.parse_args()
    if not arguments.table:
        add_missing_runs(arguments.device, arguments.seconds)
    text = page(finished())
    CACHE.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
