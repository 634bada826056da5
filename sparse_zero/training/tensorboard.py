"""TensorBoard logs that continue in the same directory when a run is resumed."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback


def log_directory(runs: Path, run: str) -> Path:
    """The directory of a run's event files: RUNS/DATE_RUN, with the date of the run's first start.

    Args: run: the run's ID.
    """
    started = sorted(runs.glob(f"*_{run}"))
    return started[0] if started else runs / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{run}"


class ResumableTensorBoardCallback(TensorBoardCallback):
    """Writes all event files of a run, also of a resumed one, to one directory below OUTPUT_DIR/runs.

    transformers' callback makes a new directory at each start, so that a run that was resumed twice appears as three
    runs.

    Only rank 0 writes. TENSORBOARD_LOGGING_DIR sets another directory, as in transformers.
    """

    def __init__(self, get_run_id: Callable[[], str]) -> None:
        """Args: get_run_id: returns the run's ID, which a resumed run reads from its checkpoint; called when training
        begins.
        """
        super().__init__()
        self._get_run_id = get_run_id
        self._has_given_directory = self.logging_dir is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not state.is_hyper_param_search:
            self.on_train_end(args, state, control)  # close the writer of an evaluation before
            if not self._has_given_directory:
                self.logging_dir = str(log_directory(Path(args.output_dir, "runs"), self._get_run_id()))
            # Steps after the checkpoint are repeated and must not be in the curve twice.
            resumed_at = state.global_step or None
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=resumed_at and resumed_at + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if self.logging_dir is None:
            # An evaluation without training would write to the working directory.
            self.logging_dir = str(Path(args.output_dir, "runs", "evaluation"))
        super().on_log(args, *rest, **kwargs)
