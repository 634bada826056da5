"""What wandb, mlflow and trackio keep of a sparse run besides what transformers gives them: its sparse settings."""

import importlib
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_zero.errors import UserError, first_line
from sparse_zero.model.sparsity import sparsity_of

TRACKERS = ("wandb", "mlflow", "trackio")


class TrackedSettings(TrainerCallback):
    """Adds `sparse.KEY` for each setting, and the numbers of scalars, to a run's parameters. It comes after the
    trackers' own callbacks, which begin the run. Only rank 0 reports."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        for name in (name for name in TRACKERS if name in args.report_to):
            _add(importlib.import_module(name), name, tracked_settings(model))


def tracked_settings(model: Any) -> dict[str, Any]:
    """The parameters of a sparse model's run. Args: model: may be wrapped."""
    sparsity = sparsity_of(model)
    settings = {f"sparse.{key}": value for key, value in sparsity.config.model_dump(mode="json").items()}
    counts = {
        "sparse.trainable_scalars": sparsity.trainable_parameters,
        "sparse.base_scalars": sparsity.total_parameters,
    }
    return {key: value for key, value in settings.items() if value is not None} | counts


def _add(tracker: Any, name: str, settings: dict[str, Any]) -> None:
    if name == "mlflow":
        if tracker.active_run() is not None:
            tracker.log_params(settings)
    elif name == "trackio":
        tracker.config.update(settings)
    elif tracker.run is not None:
        tracker.run.config.update(settings, allow_val_change=True)


def check_imports(names: list[str]) -> None:
    """Raise UserError: the package of a tracker is installed, but cannot be imported. Args: names: `report_to`."""
    for name in (name for name in TRACKERS if name in names):
        try:
            importlib.import_module(name)
        except Exception as error:  # e.g. of another version of a package that it needs
            raise UserError(
                f"training.report_to: the package of '{name}' cannot be imported: {first_line(error)}"
            ) from error
