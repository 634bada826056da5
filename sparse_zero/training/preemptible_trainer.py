"""A CheckpointedTrainer that saves a checkpoint and stops when a signal arrives, also in the middle of an
evaluation.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from sparse_zero.checkpoint import random_states
from sparse_zero.checkpoint.listing import checkpoint_path
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.ranks.stop_signals import Stopped, StopRequest
from sparse_zero.training.checkpointed_trainer import CheckpointedTrainer


class _EvaluationStopped(Exception):
    """Raised on all ranks at the same batch of an evaluation, to leave it."""


class PreemptibleTrainer(CheckpointedTrainer):
    """Stops all ranks after the same step, or in the same batch of an evaluation, when a rank has received a
    signal.
    """

    def __init__(self, *args: Any, stop: StopRequest | None = None, **kwargs: Any) -> None:
        """Args: stop: set by signals; None: signals are not handled."""
        super().__init__(*args, **kwargs)
        self._stop = stop
        self._is_stopping = False
        self._random_before_evaluation: dict[str, torch.Tensor] | None = None
        self.add_callback(_StopCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As CheckpointedTrainer.train. Raises Stopped: a signal arrived, and a checkpoint has been saved."""
        try:
            return super().train(*args, **kwargs)
        except _EvaluationStopped:
            # Before the first step
            raise self._stopped(None) from None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate. Raises Stopped: a signal arrived after training, and the trained model has been
        saved.
        """
        self._random_before_evaluation = random_states.capture()
        try:
            with self._clock.paused():
                return super().evaluate(*args, **kwargs)
        except _EvaluationStopped:
            if self.is_in_train or self._writer is None:
                raise
            directory = checkpoint_path(self._writer.output, self.state.global_step)
            # If the best model has been loaded, the optimizer's state does not belong to it.
            if not directory.exists() and not self.args.load_best_model_at_end:
                self._write()
            raise self._stopped(directory if directory.exists() else None) from None

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_stopping:
            evaluate, save = self.control.should_evaluate, self.control.should_save
            self.control.should_evaluate = self.control.should_save = False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
            self._postponed = (evaluate, evaluate and save)
            raise self._stopped(self._write())
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        except _EvaluationStopped:
            self._postponed = (True, self.control.should_save)
            raise self._stopped(self._write(states=self._random_before_evaluation)) from None

    def _stopped(self, saved: Path | None) -> Stopped:
        if saved is None and self._resumed is not None:
            saved = self._resumed.directory
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return Stopped(self.state.global_step, str(saved) if saved is not None else None)

    def _end_step(self) -> None:
        self._postponed = (False, False)
        self._check_for_stop()

    def _check_for_stop(self) -> None:
        """Set `_is_stopping` if a rank has received a signal. A collective call."""
        flags = [] if self._stop is None else [self._stop.is_raised]
        self._is_stopping = any(self._exchange_flags(*flags))


class _StopCallback(TrainerCallback):
    """Lets the trainer check for signals before the first step and in evaluations."""

    def __init__(self, trainer: PreemptibleTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._check_for_stop()
        if trainer._is_stopping:
            raise trainer._stopped(None)

    def on_prediction_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer._stop is None:
            return
        trainer._ranks = trainer._ranks or Ranks()
        if trainer._ranks.any(trainer._stop.is_raised)[0]:
            raise _EvaluationStopped
