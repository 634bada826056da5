"""transformers.Trainer with checkpoints of ours: sharded, exact, and written too when a signal asks for an end.

What the Trainer's own resuming forgets is kept here: the losses since the last line of the log, what an epoch's last
step still owed (its evaluation, its end), the states of callbacks, and that a run had been stopped for good.
"""

import dataclasses
import json
import logging
import math
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from sparse_zero.checkpoint import engine_state, random_states
from sparse_zero.checkpoint.directory import Checkpoint, Manifest, Progress, checkpoint_directory, newest_complete
from sparse_zero.checkpoint.export import describe_adapter, fixed_entries
from sparse_zero.checkpoint.saving import CheckpointWriter, describe_parameters, load_partition, read_random_states
from sparse_zero.data.sampling import SeededLengthGroupedSampler, set_epoch
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differences
from sparse_zero.model.sparsify import sparsity_of, unwrap
from sparse_zero.ranks.agreement import Ranks
from sparse_zero.ranks.stop_signals import Stopped, StopRequest
from sparse_zero.zero.parameters import settle, stage_of
from sparse_zero.zero.partitions import Partition

logger = logging.getLogger(__name__)


class _EvaluationStopped(Exception):
    """All ranks leave an evaluation at the same batch."""


class CheckpointedTrainer(Trainer):
    """A Trainer of a sparse model that saves, resumes and stops without losing anything."""

    def __init__(self, *args: Any, stop: StopRequest | None = None, **kwargs: Any) -> None:
        """Args: stop: what signals ask for; None: nobody asks."""
        super().__init__(*args, **kwargs)
        for name in ("save_only_model", "push_to_hub"):
            if getattr(self.args, name) and self.is_world_process_zero():
                logger.warning("training.%s: checkpoints stay whole, and on this disk", name)
        self.log_entries_before = 0
        """Lines of the log that an earlier part of this run has written."""
        self._stop = stop
        self._ranks: Ranks | None = None
        self._writer: CheckpointWriter | None = None
        self._resumed: Checkpoint | None = None
        self._random_states: dict[str, torch.Tensor] = {}
        self._random_before_evaluation: dict[str, torch.Tensor] | None = None
        self._is_settled = True
        self._is_stopping = False
        self._epoch_ended = False
        self._owed = (False, False)
        self._adapter: dict[str, Any] | None = None
        self.add_callback(_Watch(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer.train; True resumes from the newest complete checkpoint of the output directory.

        Raises UserError: no such checkpoint, a damaged one (the message names the file), one of another model.
        Raises Stopped: a signal asked for an end, and what there was is saved.
        """
        self._ranks = self._ranks or Ranks()
        self._resumed = self._ranks.agree(lambda: self._find(resume_from_checkpoint))
        self._is_settled = self._resumed is None
        run = self._resumed.manifest.run if self._resumed else self._ranks.gather(uuid.uuid4().hex[:12])[0]
        self._writer = CheckpointWriter(self._ranks, Path(self.args.output_dir), run, self.args.save_total_limit)
        evaluates_on_start = self.args.eval_on_start
        if self._resumed is not None:
            # It was done when the run began; once more would count for early stopping.
            self.args.eval_on_start = False
        directory = str(self._resumed.directory) if self._resumed else None
        try:
            return super().train(directory, *args, **kwargs)
        except _EvaluationStopped:
            # Before the first step
            raise self._stopped(None) from None
        finally:
            self.args.eval_on_start = evaluates_on_start

    def _find(self, wanted: str | Path | bool | None) -> Checkpoint | None:
        if wanted is None or wanted is False:
            return None
        if wanted is not True:
            return Checkpoint(wanted)
        found, problems = newest_complete(Path(self.args.output_dir))
        for problem in problems:
            logger.warning("passed over: %s", problem)
        if found is None:
            raise UserError(f"{self.args.output_dir}: holds no complete checkpoint to resume from")
        return found

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
            logger.error("%s; training goes on", error)

    def _write(self, in_background: bool = False, states: dict[str, torch.Tensor] | None = None) -> Path:
        """Collective. Raises UserError on every rank where one could not write."""
        directory = checkpoint_directory(self._writer.output, self.state.global_step)
        self._finish_last()
        if self.state.best_global_step and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(directory)
        self._writer.best = self.state.best_model_checkpoint
        parameters, partition = self._trained_parameters(), self._partition()
        manifest = Manifest(
            run=self._writer.run,
            step=self.state.global_step,
            world_size=self._ranks.count,
            zero_stage=stage_of(self.deepspeed),
            examples_per_step=self.get_total_train_batch_size(self.args),
            parameters=describe_parameters(parameters, partition, self._ranks),
            moments=self._ranks.gather(self._ranks.agree(partition.moments))[0],
            optimizer=type(partition.optimizer).__name__,
            learning_rates=partition.learning_rates(),
            scheduler=self._scheduler_state(),
            engine=engine_state.counters(self.deepspeed),
            loss_scale=engine_state.loss_scale(self.deepspeed, self.accelerator.scaler),
            progress=self._progress(),
            adapter=self._adapter_description() if self.is_world_process_zero() else {},
            shards=[],
            files={},
        )
        self._writer.save(
            manifest,
            partition,
            self._trainer_state(),
            fixed_entries(self.model) if self.is_world_process_zero() else [],
            running_loss=float(self._tr_loss),
            states=random_states.capture() if states is None else states,
            in_background=in_background,
        )
        return directory

    def _finish_last(self) -> None:
        """Collective. Make the last save visible, should it still be on its way; a failure is reported."""
        try:
            self._writer.finish()
        except UserError as error:
            if (best := self.state.best_model_checkpoint) and not Path(best).exists():
                self.state.best_model_checkpoint = None
            self._report_failure(error)

    def _progress(self) -> Progress:
        evaluation, save = self._owed
        return Progress(
            last_logged_step=self._globalstep_last_logged,
            finished=self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            epoch_ended=self._epoch_ended,
            postponed_evaluation=evaluation,
            postponed_save=save,
            forwards=sparsity_of(self.model).clock.forwards,
        )

    def _trainer_state(self) -> str:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: s[0] if len(s) == 1 else s for name, s in states.items()}
        return json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"

    def _scheduler_state(self) -> dict[str, Any] | None:
        if self.lr_scheduler is None:
            return None
        state = self.lr_scheduler.state_dict()
        try:
            return json.loads(json.dumps(state))
        except TypeError as error:
            raise UserError(
                f"training.lr_scheduler_type: no checkpoint can hold the scheduler's state: {error}"
            ) from None

    def _adapter_description(self) -> dict[str, Any]:
        if self._adapter is None:
            self._adapter = describe_adapter(self.model)
        return self._adapter

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        sparsity = sparsity_of(self.model)
        parameters = dict(unwrap(self.model).named_parameters())
        trained = {name: weight.delta for name, weight in sparsity.weights.items()}
        return trained | {name: parameters[name] for name in sparsity.whole}

    def _partition(self) -> Partition:
        if self.deepspeed is not None:
            optimizer = self.deepspeed.optimizer
        else:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # out of Accelerate's wrapper
        return Partition(self._trained_parameters(), optimizer)

    # Resuming

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        self.log_entries_before = len(self.state.log_history)
        return position

    def _load_callback_state(self) -> None:
        for name, saved in self.state.stateful_callbacks.items():
            alike = [c for c in self.callback_handler.callbacks if type(c).__name__ == name]
            for callback, state in zip(alike, saved if isinstance(saved, list) else [saved], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self._resumed is not None:
            self._resume(self._resumed)
        return model, train_dataloader

    def _resume(self, checkpoint: Checkpoint) -> None:
        manifest = checkpoint.manifest
        here = self.get_total_train_batch_size(self.args)
        if here != manifest.examples_per_step and not self.args.ignore_data_skip:
            raise UserError(
                f"{checkpoint.directory}: its steps were of {manifest.examples_per_step} examples, here they are of "
                f"{here}; choose training.per_device_train_batch_size and gradient_accumulation_steps so that they "
                f"and the {self._ranks.count} ranks multiply to {manifest.examples_per_step}"
            )
        self._ranks.agree(lambda: self._check_selection(checkpoint))
        load_partition(checkpoint, self._trained_parameters(), self._partition(), self._ranks)
        if manifest.scheduler is not None and self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(manifest.scheduler)
        engine_state.restore_counters(self.deepspeed, manifest.engine)
        engine_state.restore_loss_scale(self.deepspeed, self.accelerator.scaler, manifest.loss_scale)
        sparsity = sparsity_of(self.model)
        sparsity.clock.forwards = manifest.progress.forwards
        for weight in sparsity.weights.values():
            weight.invalidate()
        self._random_states = self._ranks.agree(lambda: self._random_states_of(checkpoint))

    def _check_selection(self, checkpoint: Checkpoint) -> None:
        if not self.is_world_process_zero():
            return
        saved, here = checkpoint.manifest.adapter, self._adapter_description()
        for key in ("tensors", "modules_to_save"):
            if saved.get(key) != here[key]:
                raise UserError(
                    f"{checkpoint.directory}: of another selection ({key} differ): resume with the `sparse` section "
                    "that the run was started with"
                )
        if odd := differences(saved.get("base_fingerprint", {}), here["base_fingerprint"]):
            raise UserError(f"{checkpoint.directory}: of a base model with other weights: '{odd[0]}' differs")

    def _random_states_of(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        if checkpoint.manifest.world_size == self._ranks.count:
            return read_random_states(checkpoint, self._ranks.rank)
        # Of other ranks no state would fit: streams of their own, the same in each resumption.
        generator = torch.Generator().manual_seed(self.args.seed + checkpoint.step)
        seeds = torch.randint(2**62, (self._ranks.count,), generator=generator)
        return {"torch": torch.Generator().manual_seed(int(seeds[self._ranks.rank])).get_state()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: what is saved goes into the optimizer's partitions, which `_prepare_for_training` makes."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        random_states.restore(self._random_states)

    def _load_best_model(self) -> None:
        checkpoint = self._ranks.agree(lambda: Checkpoint(self.state.best_model_checkpoint))
        parameters = self._trained_parameters()
        settle(unwrap(self.model))
        load_partition(checkpoint, parameters, self._partition(), self._ranks, with_moments=False)
        for weight in sparsity_of(self.model).weights.values():
            weight.invalidate()

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
        """After resuming, do what the step of the checkpoint still owed when it was saved."""
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
        self._tr_loss += losses[self._ranks.rank] if len(losses) == self._ranks.count else mean
        self._globalstep_last_logged = progress.last_logged_step
        # What an earlier part of the run has seen is logged here, but is not in this part's mean.
        self._total_loss_scalar = -mean

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_stopping:
            evaluate, save = self.control.should_evaluate, self.control.should_save
            self.control.should_evaluate = self.control.should_save = False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
            self._owed = (evaluate, evaluate and save)
            raise self._stopped(self._write())
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        except _EvaluationStopped:
            self._owed = (True, self.control.should_save)
            raise self._stopped(self._write(states=self._random_before_evaluation)) from None

    def _stopped(self, saved: Path | None) -> Stopped:
        if saved is None and self._resumed is not None:
            saved = self._resumed.directory
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return Stopped(self.state.global_step, str(saved) if saved is not None else None)

    def _meet(self) -> None:
        """Once per step: has a signal asked some rank for an end, and is the last save on every rank's disk?"""
        if self._stop is None and not self._writer.has_pending:
            return
        asked, writing = self._ranks.any(self._stop is not None and self._stop.is_raised, self._writer.is_writing)
        if self._writer.has_pending and not writing:
            self._finish_last()
        self._is_stopping = asked

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate. Raises Stopped: a signal asked for an end after training; what was trained is saved."""
        self._random_before_evaluation = random_states.capture()
        try:
            return super().evaluate(*args, **kwargs)
        except _EvaluationStopped:
            if self.is_in_train or self._writer is None:
                raise
            directory = checkpoint_directory(self._writer.output, self.state.global_step)
            # The best model, once loaded, is not what the optimizer's state belongs to.
            if not directory.exists() and not self.args.load_best_model_at_end:
                self._write()
            raise self._stopped(directory if directory.exists() else None) from None

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._settle(self.model_wrapped, int(self.state.epoch or 0), trial, None, start_time)
        self._finish_last()
        return super()._finalize_training(trial, num_train_samples, start_time)


class _Watch(TrainerCallback):
    """Tells the trainer where its loop stands."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._meet()
        if trainer._is_stopping:
            raise trainer._stopped(None)

    def on_epoch_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._epoch_ended = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._owed = (False, False)
        self._trainer._meet()

    def on_prediction_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer._stop is None:
            return
        trainer._ranks = trainer._ranks or Ranks()
        if trainer._ranks.any(trainer._stop.is_raised)[0]:
            raise _EvaluationStopped
