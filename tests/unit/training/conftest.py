"""Fixtures of the tests of the trainer."""

from pathlib import Path
from typing import Any

import pytest
from families import tiny

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.recipe.training import TrainingArguments


@pytest.fixture
def trainer():
    """Makes a trainer of 8 steps, which logs every 2 steps and evaluates before training and every 4 steps."""

    def trainer(out: Path, **settings: Any) -> SparseTrainer:
        known = {"use_cpu": True, "report_to": "tensorboard", "per_device_train_batch_size": 4, "max_steps": 8}
        known |= {"logging_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
        known |= {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
        rows = [[3 + (row + column) % 50 for column in range(12)] for row in range(48)]
        data = [{"input_ids": row, "labels": row} for row in rows]
        model = sparsify(tiny("llama"), SparseConfig(density=0.1))
        return SparseTrainer(
            model, TrainingArguments(str(out), **known | settings), train_dataset=data, eval_dataset=data[:6]
        )

    return trainer
