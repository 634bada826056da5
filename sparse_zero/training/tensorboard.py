"""TensorBoard logs that continue in the same directory when a run is resumed."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

logger = logging.getLogger(__name__)


def log_directory(runs: Path, run: str) -> Path:
    """The directory of a run's event files: RUNS/DATE_RUN, with the date of the run's first start.

    Args: run: the run's ID.
    """
    started = sorted(runs.glob(f"*_{run}"))
    return started[0] if started else runs / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{run}"


@functools.cache
def _silence_writer_threads() -> None:
    """Do not print the traceback of a thread of TensorBoard that could not write: `_surviving` says it."""
    print_traceback = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        is_writer = failure.thread is not None and type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(failure.exc_value, OSError)):
            print_traceback(failure)

    threading.excepthook = hook


class ResumableTensorBoardCallback(TensorBoardCallback):
    """Writes all event files of a run, also of a resumed one, to one directory below OUTPUT_DIR/runs.

    transformers' callback makes a new directory at each start, so that a run that was resumed twice appears as three
    runs.

    Only rank 0 writes. TENSORBOARD_LOGGING_DIR sets another directory, as in transformers.

    A full disk does not end the run: the next entry of the log tries it again in a new file.
    """

    def __init__(self, get_run_id: Callable[[], str]) -> None:
        """Args: get_run_id: returns the run's ID, which a resumed run reads from its checkpoint; called when training
        begins.
        """
        super().__init__()
        self._get_run_id = get_run_id
        self._has_given_directory = self.logging_dir is not None
        self._has_warned = False

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The writer's thread has ended with this error, which any later call would raise again.
            self.tb_writer = None
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s: the curves cannot be written (%s); training continues", self.logging_dir, error.strerror
                )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not state.is_hyper_param_search:
            self.on_train_end(args, state, control)  # close the writer of an evaluation before
            if not self._has_given_directory:
                self.logging_dir = str(log_directory(Path(args.output_dir, "runs"), self._get_run_id()))
        _silence_writer_threads()
        with self._surviving():
            if state.is_world_process_zero and not state.is_hyper_param_search:
                # Steps after the checkpoint are repeated and must not be in the curve twice.
                resumed_at = state.global_step or None
                self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=resumed_at and resumed_at + 1)
            super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if self.logging_dir is None:
            # An evaluation without training would write to the working directory.
            self.logging_dir = str(Path(args.output_dir, "runs", "evaluation"))
        with self._surviving():
            super().on_log(args, *rest, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with self._surviving():
            super().on_train_end(*args, **kwargs)
