"""One rank of whole runs with other methods. Each case is a recipe with overrides; OUT/rankN.json gets its results."""

from pathlib import Path
from typing import Any

import torch
from trainer_worker import run_each

from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training import run as runs


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    recipe = load_recipe(case["recipe"], [*case["overrides"], f"training.output_dir={out}"])
    results = runs.train(recipe, case["recipe"], merge=case["merge"])
    return {name: results[name] for name in ("loss", "trainable_parameters", "optimizer_bytes_per_rank")}


def main(cases: str, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    run_each(run, cases, out)
