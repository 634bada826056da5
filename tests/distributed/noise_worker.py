"""One rank of SparseTrainer runs with noise on the embeddings. `rpn` of a case holds its settings."""

from pathlib import Path
from typing import Any

import tiny
from trainer_worker import build, run_each

from rpn import RPNConfig
from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.training.run import noisy_objective


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments, model = build(case, out)
    sparsify(model, SparseConfig(density=tiny.density_of(model, case["task"])))
    config = RPNConfig(**case["rpn"]) if case["rpn"] else None
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=tiny.examples(case["task"], case["examples"]),
        objective=noisy_objective(model, config, arguments),
    )
    trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def main(cases: str, out: str) -> None:
    run_each(run, cases, out)
