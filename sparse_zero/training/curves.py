"""TensorBoard curves that go on where they were when a run is resumed."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback


def curve_directory(runs: Path, run: str) -> Path:
    """Where a run's event files lie: RUNS/DATE_RUN, with the date of its first start."""
    started = sorted(runs.glob(f"*_{run}"))
    return started[0] if started else runs / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{run}"


class RunCurves(TensorBoardCallback):
    """transformers' callback names a directory after the date and the host of each start, so that a run that was
    resumed twice shows as three runs. Here a run has one directory below OUTPUT_DIR/runs, wherever it is resumed.

    Rank 0 writes. TENSORBOARD_LOGGING_DIR names another directory, as ever.
    """

    def __init__(self, run: Callable[[], str]) -> None:
        """Args: run: tells the run's own name, which a resumed run has from its checkpoint; asked when it trains."""
        super().__init__()
        self._run = run
        self._is_directory_given = self.logging_dir is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not state.is_hyper_param_search:
            self.on_train_end(args, state, control)  # of an evaluation before
            if not self._is_directory_given:
                self.logging_dir = str(curve_directory(Path(args.output_dir, "runs"), self._run()))
            # Steps that were made after the checkpoint, and are made again, would be in the curve twice.
            resumed_at = state.global_step or None
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=resumed_at and resumed_at + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if self.logging_dir is None:
            # An evaluation before any training; it would go to the working directory.
            self.logging_dir = str(Path(args.output_dir, "runs", "evaluation"))
        super().on_log(args, *rest, **kwargs)
