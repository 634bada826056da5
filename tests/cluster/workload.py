"""The run that the cluster's tests start in many ways: a tiny language model, its data and a recipe, on all hosts."""

import json
from pathlib import Path
from typing import Any

import recipes
import tiny
from trainer_cases import zero_config

STEPS, RANKS = 6, 2


def losses(output: Path) -> dict[int, float]:
    """The loss of each step, as logged up to the newest checkpoint of a run's output directory, resumed or not."""
    states = list(output.glob("checkpoint-*/trainer_state.json"))
    assert states, f"{output} holds no checkpoint"
    newest = max(states, key=lambda state: int(state.parent.name.partition("-")[2]))
    logged = [entry for entry in json.loads(newest.read_text())["log_history"] if "loss" in entry]
    steps = [entry["step"] for entry in logged]
    assert steps == list(range(1, len(steps) + 1)), f"{newest} has the losses of steps {steps}"
    return {entry["step"]: entry["loss"] for entry in logged}


class Workload:
    """Files that every host sees, for a run of STEPS steps on RANKS ranks with ZeRO stage 2.

    Everything can be changed by overrides: training.output_dir=..., which each run needs, training.save_steps=2, ...
    """

    def __init__(self, directory: Path) -> None:
        """Write the base, the data and the recipe. Takes seconds, for torch."""
        self.directory = directory
        tiny.save_llama(directory / "base")
        recipes.write_data(directory)
        (directory / "zero2.json").write_text(json.dumps(zero_config(2)))
        training: dict[str, Any] = {
            "deepspeed": "zero2.json",
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",  # a longer run begins with the same losses
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": STEPS,
            "report_to": "tensorboard",
        }
        # Whole steps: an incomplete last one of an epoch is another one on another number of ranks.
        data = {"train_size": 56}
        self.recipe = recipes.write_recipe(
            directory / "run.yaml", directory / "base", "causal-lm", directory, training=training, data=data
        )
