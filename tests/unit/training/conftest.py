"""Fixtures of the tests of the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import recipes
import tiny as tiny_files
from families import tiny
from transformers import TrainerCallback

from sparse_zero import SparseConfig, SparseTrainer, sparsify
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training import run as runs


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


class Killed(TrainerCallback):
    """Ends the run at the beginning of a step, as if the process had been killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def run(trainer):
    """Trains six steps, and saves each; returns the trainer."""

    def run(
        out: Path,
        resume: str | Path | bool | None = None,
        killed_at: int | None = None,
        reset: Sequence[str] = (),
        examples: slice = slice(None),
        **settings: Any,
    ) -> SparseTrainer:
        known = {"report_to": "none", "disable_tqdm": True, "eval_strategy": "no", "eval_on_start": False}
        known |= {"max_steps": 6, "logging_steps": 1, "learning_rate": 0.05}
        made = trainer(out, **known | settings)
        made.train_dataset = made.train_dataset[examples]
        if killed_at is None:
            made.train(resume_from_checkpoint=resume, reset=reset)
        else:
            made.add_callback(Killed(killed_at))
            with pytest.raises(KeyboardInterrupt):
                made.train(resume_from_checkpoint=resume, reset=reset)
        return made

    return run


@pytest.fixture(scope="session")
def recipe_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny language model in base, and data."""
    directory = tmp_path_factory.mktemp("recipes")
    tiny_files.save_llama(directory / "base")
    recipes.write_data(directory)
    return directory


@pytest.fixture
def recipe(recipe_base: Path, tmp_path: Path):
    """recipe(NAME, **sections): writes a recipe of four steps, of which each is saved; returns its file. The run's
    directory has the same name without the suffix.
    """

    def recipe(name: str, /, **sections: dict[str, Any]) -> Path:
        training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
        training |= {"eval_on_start": False, "lr_scheduler_type": "constant", "learning_rate": 0.01}
        sections["training"] = training | sections.get("training", {})
        return recipes.write_recipe(
            tmp_path / f"{name}.yaml", recipe_base / "base", "causal-lm", recipe_base, **sections
        )

    return recipe


@pytest.fixture
def train():
    """train(FILE, *overrides, **options of run.train): runs a recipe in this process; returns its results."""

    def train(file: Path, *overrides: str, **options: Any) -> dict[str, Any]:
        return runs.train(load_recipe(file, list(overrides)), str(file), **options)

    return train
