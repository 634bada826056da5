"""A transformers.Trainer with sharded checkpoints, from which a run resumes exactly; see also `resuming_trainer`.

It also restores what the Trainer's own resume loses: the losses since the last line of the log, an evaluation or an
epoch's end that was due in the last step, the states of callbacks, and that a callback had stopped the training.
"""

import contextlib
import dataclasses
import json
import logging
import math
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from sparse_zero.checkpoint import deepspeed_state, random_states
from sparse_zero.checkpoint.directory import newest_complete
from sparse_zero.checkpoint.export import fixed_entries
from sparse_zero.checkpoint.listing import checkpoint_path
from sparse_zero.checkpoint.manifest import Manifest, Progress
from sparse_zero.checkpoint.resume import check_resets
from sparse_zero.checkpoint.shards import Entry
from sparse_zero.checkpoint.trainer_state import check_trainer_state
from sparse_zero.checkpoint.writer import CheckpointWriter, describe_parameters
from sparse_zero.data.sampling import SeededLengthGroupedSampler, set_epoch
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.training.resuming_trainer import ResumingTrainer
from sparse_zero.training.training_clock import TrainingClock
from sparse_zero.zero.parameters import full_numel, zero_stage

logger = logging.getLogger(__name__)


class CheckpointedTrainer(ResumingTrainer):
    """A Trainer of a sparse model that saves complete checkpoints, and resumes from them exactly."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ignored = {
            "save_only_model": "checkpoints always contain the optimizer's state",
            "push_to_hub": "only the adapter is pushed; checkpoints stay in training.output_dir",
        }
        for name, consequence in ignored.items():
            if getattr(self.args, name) and self.is_world_process_zero():
                logger.warning("training.%s: %s", name, consequence)
        self._writer: CheckpointWriter | None = None
        self._is_settled = True
        self._epoch_ended = False
        self._postponed = (False, False)
        """Whether an evaluation and a save remained to be done in the current step when a signal arrived."""
        self._clock = TrainingClock()
        self._tokens = 0
        """Tokens of this rank's batches since this process began to train, including padding."""
        self.add_callback(_LoopCallback(self))

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        *args: Any,
        reset: Collection[str] = (),
        **kwargs: Any,
    ) -> TrainOutput:
        """As Trainer.train.

        Checkpoints in the output directory that are newer than the one from which the run resumes are moved to
        OUTPUT_DIR/abandoned, or all of them if it does not resume or resumes from another directory.

        Args:
            resume_from_checkpoint: a checkpoint; True for the newest complete checkpoint in the output directory.
            reset: what to take from this run's settings instead of from the checkpoint: "learning_rate", "optimizer",
                "data". See `checkpoint.resume.RESETS`.

        Raises UserError: there is no such checkpoint, a file of it is damaged, it is of another model, or this run has
            settings with which it cannot go on.
        """
        self._ranks, self._reset = self._ranks or Ranks(), check_resets(reset)
        self._resumed = self._open(resume_from_checkpoint)
        if self._resumed is not None:
            self._ranks.run_together(lambda: check_trainer_state(self._resumed))
        self._is_settled = self._resumed is None
        self._tokens = 0
        run = self._resumed.manifest.run if self._resumed else self._ranks.gather(uuid.uuid4().hex[:12])[0]
        self._writer = CheckpointWriter(self._ranks, Path(self.args.output_dir), run, self.args.save_total_limit)
        self._writer.settings = self._settings()
        changed = {}
        if self._resumed is None:
            self._leave_branch()
        else:
            # The run has already evaluated; a second time would count for early stopping. Some schedules divide by the
            # initial rate, which has to be the one that is restored.
            changed = {"eval_on_start": False, "learning_rate": self._writer.settings["training"]["learning_rate"]}
        directory = str(self._resumed.directory) if self._resumed else None
        with _changed(self.args, changed):
            return super().train(directory, *args, **kwargs)

    def trained_so_far(self) -> tuple[float, int]:
        """The seconds of training without evaluations, and the tokens of all ranks with padding. A collective call.

        A resumed run adds them to those of its checkpoint, which are 0 in checkpoints that do not have them.
        """
        seconds, tokens = self._clock.seconds, sum(self._ranks.gather(self._tokens))
        if self._resumed is None:
            return seconds, tokens
        before = self._resumed.manifest.progress
        return before.train_seconds + seconds, before.train_tokens + tokens

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        best = self.state.best_model_checkpoint
        try:
            self._write(in_background=getattr(self.args, "async_save", False))
        except UserError as error:
            self.state.best_model_checkpoint = best
            self._report_failure(error)

    def _report_failure(self, error: UserError) -> None:
        if self.is_world_process_zero():
            logger.error("%s; training continues", error)

    def _write(self, in_background: bool = False, states: dict[str, torch.Tensor] | None = None) -> Path:
        """Save a checkpoint. A collective call. Raises UserError on every rank if a rank could not write.

        Args: states: random states to save; None: the current ones.
        """
        directory = checkpoint_path(self._writer.output, self.state.global_step)
        self._finish_last_save()
        if self.state.best_global_step and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(directory)
        self._writer.best = self.state.best_model_checkpoint
        parameters, partition = self._trained_parameters(), self._partition()
        manifest = Manifest(
            run=self._writer.run,
            step=self.state.global_step,
            world_size=self._ranks.world_size,
            zero_stage=zero_stage(self.deepspeed),
            examples_per_step=self.get_total_train_batch_size(self.args),
            parameters=describe_parameters(parameters, partition, self._ranks),
            moments=self._ranks.gather(self._ranks.run_together(partition.moments))[0],
            optimizer=type(partition.optimizer).__name__,
            learning_rates=partition.learning_rates(),
            scheduler=self._scheduler_state(),
            engine=deepspeed_state.engine_counters(self.deepspeed),
            loss_scale=deepspeed_state.loss_scale(self.deepspeed, self.accelerator.scaler),
            progress=self._progress(),
            adapter=self._adapter_description() if self.is_world_process_zero() else {},
            shards=[],
            files={},
        )
        self._writer.save(
            manifest,
            partition,
            self._trainer_state(),
            self._fixed_entries() if self.is_world_process_zero() else [],
            running_loss=float(self._tr_loss),
            states=random_states.capture() if states is None else states,
            in_background=in_background,
        )
        return directory

    def _fixed_entries(self) -> list[Entry]:
        return fixed_entries(self.model)

    def checkpoint_bytes(self) -> int | None:
        """The size of this run's newest checkpoint in bytes; if it has none, of the values and moments of one. None:
        checkpoints cannot store the optimizer's state.
        """
        saved, _ = newest_complete(Path(self.args.output_dir))
        if saved is None:
            scalars = sum(full_numel(parameter) for parameter in self._trained_parameters().values())
            try:
                return 4 * scalars * (1 + len(self._partition().moments()))
            except UserError:
                return None
        manifest = saved.manifest
        return sum(r.bytes for r in (*manifest.files.values(), *(shard.file for shard in manifest.shards)))

    def _finish_last_save(self) -> None:
        """Publish the last save, if it is not finished yet, and report a failure. A collective call."""
        try:
            self._writer.finish()
        except UserError as error:
            if (best := self.state.best_model_checkpoint) and not Path(best).exists():
                self.state.best_model_checkpoint = None
            self._report_failure(error)

    def _progress(self) -> Progress:
        evaluation, save = self._postponed
        seconds, tokens = self.trained_so_far()
        return Progress(
            last_logged_step=self._globalstep_last_logged,
            finished=self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            epoch_ended=self._epoch_ended,
            postponed_evaluation=evaluation,
            postponed_save=save,
            forwards=self._forwards(),
            train_seconds=seconds,
            train_tokens=tokens,
        )

    def _trainer_state(self) -> str:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: s[0] if len(s) == 1 else s for name, s in states.items()}
        return json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"

    # The loop

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return SeededLengthGroupedSampler(self.get_total_train_batch_size(self.args), sampler.lengths, seed)
        return sampler

    def _run_epoch(self, **epoch: Any) -> None:
        self._settle(**{key: epoch[key] for key in ("model", "epoch", "trial", "ignore_keys_for_eval", "start_time")})
        if self.control.should_training_stop:
            return
        set_epoch(epoch["train_dataloader"], epoch["epoch"])
        super()._run_epoch(**epoch)

    def _settle(self, model: Any, epoch: int, trial: Any, ignore_keys_for_eval: Any, start_time: float) -> None:
        """After a resume, do what remained to be done in the checkpoint's step when it was saved."""
        if self._is_settled:
            return
        self._is_settled = True
        progress = self._resumed.manifest.progress
        random_states.restore(self._random_states)
        self._restore_running_loss(progress)

        def log_save_evaluate(evaluate: bool, save: bool) -> None:
            self.control.should_evaluate, self.control.should_save = evaluate, save
            self._maybe_log_save_evaluate(
                self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
            )

        self.control.should_log = False
        self._epoch_ended = progress.epoch_ended
        if progress.postponed_evaluation:
            log_save_evaluate(True, progress.postponed_save)
        is_done = progress.finished or self.state.global_step >= self.state.max_steps
        if not progress.epoch_ended and (is_done or float(self.state.epoch).is_integer()):
            self.control.should_evaluate = self.control.should_save = False
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            log_save_evaluate(self.control.should_evaluate, self.control.should_save)
        self._epoch_ended = False
        if is_done:
            self.control.should_training_stop = True
        self._random_states = random_states.capture()

    def _restore_running_loss(self, progress: Progress) -> None:
        losses = [shard.running_loss for shard in self._resumed.manifest.shards]
        mean = math.fsum(losses) / len(losses)
        self._tr_loss += losses[self._ranks.rank] if len(losses) == self._ranks.world_size else mean
        self._globalstep_last_logged = progress.last_logged_step
        # These losses are logged now, but train_loss is the mean since the resume.
        self._total_loss_scalar = -mean

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._settle(self.model_wrapped, int(self.state.epoch or 0), trial, None, start_time)
        self._clock.stop()
        self._finish_last_save()
        # With a limit of 1 it would delete the last checkpoint, from which a run resumes if its end fails.
        with _changed(self.args, {"save_total_limit": None}):
            return super()._finalize_training(trial, num_train_samples, start_time)

    def _end_step(self) -> None:
        self._exchange_flags()

    def _exchange_flags(self, *flags: bool) -> list[bool]:
        """Whether a rank has raised each flag. Also publishes the last background save once all ranks have written it.

        A collective call: one small message per step, and none if there is neither a flag nor a pending save.
        """
        if not flags and not self._writer.has_pending:
            return []
        *raised, is_writing = self._ranks.any(*flags, self._writer.is_writing)
        if self._writer.has_pending and not is_writing:
            self._finish_last_save()
        return raised


@contextlib.contextmanager
def _changed(arguments: TrainingArguments, values: Mapping[str, Any]) -> Iterator[None]:
    before = {key: getattr(arguments, key) for key in values}
    try:
        for key, value in values.items():
            setattr(arguments, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(arguments, key, value)


class _LoopCallback(TrainerCallback):
    """Tells the trainer where its loop is."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._clock.start()

    def on_epoch_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._epoch_ended = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if args.torch_compile and self._trainer.is_deepspeed_enabled:
            self._trainer._write_deltas()  # a compiled forward does not write the deltas
        self._trainer._end_step()
