"""Test accuracy of LoRA on the sentences of noise_quality.py, next to its sparse and full runs without noise.

    python benchmarks/lora_quality.py             whatever runs are missing; lora_quality.jsonl
    python benchmarks/lora_quality.py --limit 1   one of them
    python benchmarks/lora_quality.py --table     no runs: the page again from both files

MiniLM-L6 on Rotten Tomatoes, the same training and test sentences, order and head for all three methods of a seed.
LoRA has PEFT's defaults, on all linear layers, with the rank whose number of scalars comes nearest to the sparse runs'
budget. Its learning rate is the best on validation sentences, of RATES, as for the other two. Each run is one line.
"""

import argparse
from typing import Any

import peft
import torch
from noise_quality import append_row, read_rows, train_and_measure
from noise_quality_plan import EPOCHS, SEEDS, SIZES, TUNING_SEEDS, TUNING_SIZE, Row, Run, best
from noise_quality_table import percent, scores
from tables import RESULTS, table
from torch import nn
from transformers.utils import logging

from sparse_zero import SparseConfig
from sparse_zero.selection.targets import find_modules_to_save, find_targets, parameter_names

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CACHE = RESULTS / "lora_quality.jsonl"


def lora(
    model: nn.Module,
    run: Any,
    targets_of: Any = "all-linear",
    alpha_of_rank: float | None = None,
    task_type: str = "SEQ_CLS",
) -> nn.Module:
    """PEFT's LoRA with about `run.density` of the model's scalars, a classifier trained in full among them.

    Args:
        targets_of: as `SparseConfig.targets`.
        alpha_of_rank: lora_alpha over the rank; None: PEFT's own lora_alpha.
    """
    config = SparseConfig(targets=targets_of)
    whole = find_modules_to_save(model, config)
    targets = find_targets(model, config, whole)
    head = {name: dict(model.named_parameters())[name].numel() for name in parameter_names(model, whole)}
    budget = run.density * sum(p.numel() for p in model.parameters()) - sum(head.values())
    rank = max(1, round(budget / sum(sum(target.shape) for target in targets.values())))
    modules = [name.removesuffix(".weight") for name in targets]
    settings = {} if alpha_of_rank is None else {"lora_alpha": alpha_of_rank * rank}
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, r=rank, target_modules=modules, **settings))


def tuning_runs() -> list[Run]:
    return [
        Run("lora", "none", None, rate, TUNING_SIZE, EPOCHS[TUNING_SIZE], seed, "validation")
        for seed in TUNING_SEEDS
        for rate in RATES
    ]


def plan(done: dict[str, Row]) -> list[Run]:
    """The tuning runs and, once they are done, the runs on test sentences at the rate that they chose."""
    winner = best(tuning_runs(), done)
    measured = [
        Run("lora", "none", None, winner.learning_rate, size, EPOCHS[size], seed, "test")
        for seed in SEEDS
        for size in (SIZES if winner else ())
    ]
    return [*tuning_runs(), *measured]


def add_missing_runs(limit: int | None, device: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    added = 0
    while added != limit:
        done = read_rows(CACHE)
        missing = [run for run in plan(done) if run.key not in done]
        if not missing:
            return
        row = train_and_measure(missing[0], device, adapt=lora)
        append_row(CACHE, row)
        added += 1
        print(f"{len(missing) - 1} left: {row['learning_rate']:g} {row['size']} {row['split']} {row['accuracy']:.4f}")


def page(lora_rows: dict[str, Row], other_rows: dict[str, Row]) -> str:
    rows = [*lora_rows.values(), *(row for row in other_rows.values() if row["noise"] == "none")]
    lines = []
    for method in ("sparse", "lora", "full"):
        tested = [row for row in rows if row["method"] == method and row["split"] == "test"]
        assert len(tested) == len(SIZES) * len(SEEDS)
        cells = []
        for size in SIZES:
            cells.append(percent([row["accuracy"] for row in tested if row["size"] == size]))
        # The oldest rows do not have the number of scalars
        trainable = next((f"{row['trainable']:,}" for row in tested if "trainable" in row), "")
        lines.append([method, trainable, f"{tested[0]['learning_rate']:g}", *cells])
    tuned = scores(tuning_runs(), "learning_rate", lora_rows)
    return "\n\n".join(
        [
            "# Test accuracy of LoRA, sparse and full fine-tuning",
            "Rotten Tomatoes sentences, MiniLM-L6, 1,000 test sentences; percent, mean ± standard deviation over "
            f"{len(SEEDS)} seeds; columns: training sentences. Made by `python benchmarks/lora_quality.py`; the "
            "sparse and full runs are those of `python benchmarks/noise_quality.py`.",
            table(["method", "trainable", "rate", *(f"{size:,}" for size in SIZES)], lines),
            f"LoRA's learning rates on validation sentences: {tuned}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="runs of this call")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--table", action="store_true", help="no runs: the page again from both files")
    arguments = parser.parse_args()
    if not arguments.table:
        add_missing_runs(arguments.limit, arguments.device)
    done = read_rows(CACHE)
    if missing := [run for run in plan(done) if run.key not in done]:
        print(f"no page: {len(missing)} runs are missing")
    else:
        CACHE.with_suffix(".md").write_text(page(done, read_rows(RESULTS / "noise_quality.jsonl")) + "\n")


if __name__ == "__main__":
    main()
