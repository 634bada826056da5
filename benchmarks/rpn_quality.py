"""Does Random Position Noise help on its paper's tasks? Against other noises, changed texts, and its own public code.

    python benchmarks/rpn_quality.py --data tweeteval --seconds 3600                 what is missing, by worth
    python benchmarks/rpn_quality.py --data tweeteval --tasks irony --methods full   a part of it
    python benchmarks/rpn_quality.py --data tweeteval --size 500 --epochs 3          a smaller experiment
    python benchmarks/rpn_quality.py --list
    python benchmarks/rpn_quality.py --table                                         no runs: page and plot again

MiniLM-L6 on the seven tasks of TweetEval, 2,000 training tweets, full and sparse; each task has its own metric. The
learning rate of each task and method, and on one task the strength of each noise, are chosen on validation tweets with
a seed of their own; test tweets are used once, at the end of a run. Every run is one entry of
results/rpn_quality.json; an interrupted call continues with what is missing, and several calls share the runs. Runs
of a seed share training tweets,
head, order and positions.

A noise takes two passes for each step, as changed copies (eda, aeda) take twice the steps: `none, twice the epochs` is
the control. Three faults of RPN's public code (github.com/DLYuanGod/RPN) are switched on one at a time:
    mask per epoch   which scalars move is drawn in an epoch's first step; later steps move those at which the step
                     before had put its own (as the code does, which permutes its mask with the scalars)
    padding moved    batches are padded to 64 tokens, and padding takes part
    one order        all epochs have the order of the first
The fourth, tests that leave out the last batch, needs no runs: each has its accuracy both ways.
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
import tweeteval
from noise_quality import batches_by_length, claimed, device_name
from noise_quality_plan import BASE_MODEL
from rpn_quality_plan import (
    METHODS,
    NAMES,
    SEEDS,
    SELECTIONS,
    STRENGTHS,
    TASKS,
    Row,
    Run,
    Scale,
    key_of,
    noise_of,
    plan,
)
from rpn_quality_table import write_page
from tables import RESULTS
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

import rpn
from rpn.noise import move_scalars
from rpn.text import augment
from sparse_zero import SparseConfig, package_path, sparsify

CACHE = RESULTS / "rpn_quality.json"
SELECTION_BATCHES = 8


class CarriedMask:
    """RPN as in its public code: the mask is drawn in the first step of an epoch and is permuted with the scalars."""

    def __init__(self, probability: float, steps: int, scalars: int, seed: int) -> None:
        """Args: steps: of an epoch. scalars: of the largest batch."""
        self.probability, self.steps, self.scalars, self.seed = probability, steps, scalars, seed
        self._epoch, self._mask = -1, torch.empty(0)

    def __call__(self, embeddings: Tensor, keep: Tensor, stream: rpn.Stream) -> Tensor:
        generator = torch.Generator().manual_seed(stream.key % 2**63)
        if stream.step // self.steps != self._epoch:
            self._epoch = stream.step // self.steps
            self._mask = torch.rand(self.scalars, generator=generator) < self.probability
        real = keep[:, :, None].expand_as(embeddings).flatten().nonzero().squeeze(1)
        order = torch.randperm(real.numel(), generator=generator)
        moved = self._mask[: real.numel()][order]
        self._mask = torch.cat([moved, self._mask[real.numel() :]])
        flat, moved = embeddings.flatten(), moved.to(embeddings.device)
        return flat.scatter(0, real[moved], flat[real[order.to(real.device)]][moved]).view_as(embeddings)


def noise_for(run: Run, steps: int, hidden: int) -> tuple[rpn.RPNConfig, Any]:
    """The settings of the noise, and the function of a faulty one."""
    noise = noise_of(run.name)
    if noise not in STRENGTHS:
        return rpn.RPNConfig(noise="none"), None
    settings: dict[str, Any] = {"noise": noise, STRENGTHS[noise][0]: run.strength, "seed": run.seed}
    if noise in ("freelb", "symnoise"):
        settings |= {"clean": False, "passes": 2, "noisy_weight": 0.5}
    function = None
    if run.name == "rpn, mask per epoch":
        function = CarriedMask(run.strength, steps, run.batch_size * run.max_length * hidden, run.seed)
    if run.name == "rpn, padding moved":

        def function(embeddings: Tensor, keep: Tensor, stream: rpn.Stream) -> Tensor:
            return move_scalars(embeddings, torch.ones_like(keep), stream, probability=run.strength)

    return rpn.RPNConfig(**settings), function


@cache
def tokenizer_of(base_model: str = BASE_MODEL) -> Any:
    return AutoTokenizer.from_pretrained(package_path(base_model))


def training_data(run: Run, directory: Path) -> tuple[list[list[int]], list[int]]:
    """Token ids and labels, with the changed copies."""
    texts, labels = tweeteval.drawn(tweeteval.part(directory, run.task, "train"), run.size, run.seed)
    if run.name in ("eda", "aeda"):
        texts = [*texts, *(augment(text, run.name, Random(f"{run.seed} {n}")) for n, text in enumerate(texts))]
        labels = labels * 2
    return tokenizer_of()(texts, truncation=True, max_length=run.max_length).input_ids, labels


def collate(batch: list[int], ids: list[list[int]], labels: list[int], device: str, width: int | None = None) -> dict:
    """Args: width: to which all are padded; None: the longest."""
    width = width or max(len(ids[index]) for index in batch)
    tokens, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
    for row, index in enumerate(batch):
        tokens[row, : len(ids[index])] = torch.tensor(ids[index])
        mask[row, : len(ids[index])] = 1
    tensors = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([labels[i] for i in batch])}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def epochs_of(run: Run, lengths: list[int]) -> Iterator[list[list[int]]]:
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.epochs):
        if run.name == "rpn, one order":
            generator.manual_seed(run.seed)
        yield batches_by_length(list(range(len(lengths))), lengths, run.batch_size, generator)


def train_and_measure(run: Run, directory: Path, device: str) -> Row:
    """Train and evaluate once. Returns: the entry of the results."""
    started, cpu_started = time.perf_counter(), time.process_time()
    ids, labels = training_data(run, directory)
    epochs = list(epochs_of(run, [len(tokens) for tokens in ids]))
    torch.manual_seed(run.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        package_path(BASE_MODEL), num_labels=tweeteval.CLASSES[run.task], dtype=torch.float32
    ).to(device)
    if run.method == "sparse":
        _make_sparse(model, run, [collate(batch, ids, labels, device) for batch in epochs[0][:SELECTION_BATCHES]])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0, fused=True)
    steps = sum(map(len, epochs))
    schedule = get_linear_schedule_with_warmup(optimizer, int(run.warmup * steps), steps)
    config, function = noise_for(run, len(epochs[0]), model.config.hidden_size)
    handle = rpn.attach(model, config, noise=function)
    precision = torch.autocast(device, torch.bfloat16, enabled=run.precision == "bfloat16")
    width = run.max_length if run.name == "rpn, padding moved" else None
    model.train()
    for step, batch in enumerate(batch for epoch in epochs for batch in epoch):
        inputs = collate(batch, ids, labels, device, width)

        def forward(inputs: dict = inputs) -> Tensor:
            with precision:
                return model(**inputs).loss

        handle.place(step=step)
        rpn.run_passes(handle, config, forward, lambda loss, last: loss.backward())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    handle.detach()
    return {
        **asdict(run),
        **_measure(model, run, directory, precision, device),
        "trained": len(ids),
        "trainable": sum(parameter.numel() for parameter in trained),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _make_sparse(model: Any, run: Run, batches: list[dict]) -> None:
    selection = run.name if run.name in SELECTIONS else "stratified"
    config = SparseConfig(density=run.density, targets="all-linear", seed=run.seed, selection=selection)
    sparsify(model, config, batches=batches if config.uses_gradients else None)


def _measure(model: Any, run: Run, directory: Path, precision: Any, device: str) -> Row:
    texts, labels = tweeteval.drawn(tweeteval.part(directory, run.task, run.split), run.held_out, 0)
    ids = tokenizer_of()(texts, truncation=True, max_length=run.max_length).input_ids
    model.eval()
    predicted, loss = [0] * len(ids), 0.0
    ordered = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    with torch.inference_mode(), precision:
        for start in range(0, len(ordered), 100):
            batch = ordered[start : start + 100]
            output = model(**collate(batch, ids, labels, device))
            loss += output.loss.item() * len(batch)
            for index, label in zip(batch, output.logits.argmax(1).tolist(), strict=True):
                predicted[index] = label
    accuracy, without_last = tweeteval.accuracies(labels, predicted)
    return {
        "score": tweeteval.score(run.task, labels, predicted),
        "accuracy": accuracy,
        "accuracy_without_last_batch": without_last,
        "loss": round(loss / len(ids), 5),
        "tested": len(ids),
    }


# ---- the results


def read_results(path: Path = CACHE) -> dict[str, Row]:
    """The finished runs by their keys."""
    return {key_of(row): row for row in json.loads(path.read_text())} if path.exists() else {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        path.with_suffix(".lock").unlink(missing_ok=True)


def add_result(row: Row, path: Path = CACHE) -> None:
    """Write the file anew, with one entry on each line. Other calls may do the same."""
    with _locked(path):
        rows = [*(read_results(path) | {key_of(row): row}).values()]
        text = "[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)


def seconds_of(run: Run, done: dict[str, Row], device: str) -> float:
    """An estimate from the runs on this device: seconds of a pass over a training tweet, times those of the run."""
    here = [row["seconds"] / _passes(row) for row in done.values() if row["device"] == device]
    return max(here[-5:], default=0.0) * _passes(asdict(run))


def _passes(row: Row) -> int:
    twice = noise_of(row["name"]) in (*STRENGTHS, "eda", "aeda")
    return row["size"] * row["epochs"] * (2 if twice else 1)


def make_runs(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end, device = time.monotonic() + arguments.seconds, device_name(arguments.device)

    def missing() -> list[Run]:
        done = read_results()
        return [run for run in selected_plan(arguments, done) if run.key not in done]

    for run in claimed(CACHE, missing):
        if time.monotonic() + seconds_of(run, read_results(), device) > end:
            print(f"{len(missing())} runs are missing; the next may not fit into what is left of the time")
            return
        row = train_and_measure(run, arguments.data, arguments.device)
        add_result(row)
        print(
            f"{time.strftime('%H:%M:%S')} {run.task} {run.method} {run.name} {run.strength or ''} "
            f"rate {run.learning_rate:g} seed {run.seed} {run.split} {row['score']:.4f} loss {row['loss']:.4f} "
            f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )
    print("nothing is missing")


def selected_plan(arguments: argparse.Namespace, done: dict[str, Row]) -> list[Run]:
    scale = Scale(arguments.size, arguments.epochs)
    planned = plan(scale.results(done), arguments.tasks, arguments.methods, arguments.names)
    return [scale.run(run) for run in planned if run.split == "validation" or run.seed in arguments.seeds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the tasks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before a run that may take longer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES, help="variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, choices=SEEDS, help="of the tests")
    parser.add_argument("--size", type=int, default=Run.size, help="training tweets")
    parser.add_argument("--epochs", type=int, default=Run.epochs, help="of `none`")
    parser.add_argument("--list", action="store_true", help="no runs: which are known, and which of them are missing")
    parser.add_argument("--table", action="store_true", help="no runs: page and plot again")
    arguments = parser.parse_args()
    if arguments.list:
        done = read_results()
        for run in selected_plan(arguments, done):
            print("done   " if run.key in done else "missing", run.key)
        return 0
    if not arguments.table:
        if arguments.data is None:
            parser.error("--data: name the folder with TASK_train.csv, TASK_val.csv and TASK_test.csv")
        make_runs(arguments)
    print(write_page(read_results(), CACHE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
