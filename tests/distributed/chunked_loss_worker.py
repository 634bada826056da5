"""One rank of SparseTrainer runs with a head that is frozen, selected or trained in full."""

from pathlib import Path
from typing import Any

import tiny
from trainer_worker import WatchedTrainer, build, run_each

from sparse_zero import SparseConfig, sparsify

HEADS = {
    "frozen": {"targets": ["v_proj", "o_proj"], "density": 0.05},
    "selected": {"targets": ["v_proj", "lm_head"], "density": 0.05},
    "whole": {"targets": ["v_proj"], "modules_to_save": ["lm_head"], "density": 0.15},
}


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments, model = build(case, out)
    sparsify(model, SparseConfig(**HEADS[case["head"]]))
    trainer = WatchedTrainer(model, arguments, train_dataset=tiny.examples(case["task"], case["examples"]))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "norms": [entry.get("grad_norm") for entry in steps],
        "frozen_with_gradient": sorted(trainer.frozen_with_gradient),
    }


def main(cases: str, out: str) -> None:
    run_each(run, cases, out)
