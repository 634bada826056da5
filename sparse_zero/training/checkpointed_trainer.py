"""A transformers.Trainer with sharded checkpoints, from which a run resumes exactly.

It also restores what the Trainer's own resume loses: the losses since the last line of the log, an evaluation or an
epoch's end that was due in the last step, the states of callbacks, and that a callback had stopped the training.
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

from sparse_zero.adapters.files import described
from sparse_zero.checkpoint import deepspeed_state, random_states
from sparse_zero.checkpoint.directory import Checkpoint, checkpoint_path, newest_complete
from sparse_zero.checkpoint.export import describe_adapter, fixed_entries, load_buffers
from sparse_zero.checkpoint.loader import load_partition, read_random_states
from sparse_zero.checkpoint.manifest import Manifest, Progress
from sparse_zero.checkpoint.writer import CheckpointWriter, describe_parameters
from sparse_zero.data.sampling import SeededLengthGroupedSampler, set_epoch
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differing_parameters
from sparse_zero.model.sparse_model import refresh
from sparse_zero.model.sparsity import sparsity_of
from sparse_zero.model.wrappers import unwrap
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.zero.parameters import wait_for_prefetch, zero_stage
from sparse_zero.zero.partitions import Partition

logger = logging.getLogger(__name__)


class CheckpointedTrainer(Trainer):
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
        self.log_entries_before = 0
        """The number of log entries that were written before this run was resumed."""
        self._ranks: Ranks | None = None
        self._writer: CheckpointWriter | None = None
        self._resumed: Checkpoint | None = None
        self._random_states: dict[str, torch.Tensor] = {}
        self._is_settled = True
        self._epoch_ended = False
        self._postponed = (False, False)
        """Whether an evaluation and a save remained to be done in the current step when a signal arrived."""
        self._adapter: dict[str, Any] | None = None
        self.add_callback(_LoopCallback(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer.train.

        Args: resume_from_checkpoint: a checkpoint; True for the newest complete checkpoint in the output directory.

        Raises UserError: there is no such checkpoint, a file of it is damaged, or it is of another model.
        """
        self._ranks = self._ranks or Ranks()
        self._resumed = self._ranks.run_together(lambda: self._find(resume_from_checkpoint))
        self._is_settled = self._resumed is None
        run = self._resumed.manifest.run if self._resumed else self._ranks.gather(uuid.uuid4().hex[:12])[0]
        self._writer = CheckpointWriter(self._ranks, Path(self.args.output_dir), run, self.args.save_total_limit)
        evaluates_on_start = self.args.eval_on_start
        if self._resumed is not None:
            # The run has already done it; a second time would count for early stopping.
            self.args.eval_on_start = False
        directory = str(self._resumed.directory) if self._resumed else None
        try:
            return super().train(directory, *args, **kwargs)
        finally:
            self.args.eval_on_start = evaluates_on_start

    def _find(self, requested: str | Path | bool | None) -> Checkpoint | None:
        if requested is None or requested is False:
            return None
        if requested is not True:
            return Checkpoint(requested)
        found, problems = newest_complete(Path(self.args.output_dir))
        for problem in problems:
            logger.warning("skipped: %s", problem)
        if found is None:
            raise UserError(f"{self.args.output_dir}: contains no complete checkpoint to resume from")
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
            fixed_entries(self.model) if self.is_world_process_zero() else [],
            running_loss=float(self._tr_loss),
            states=random_states.capture() if states is None else states,
            in_background=in_background,
        )
        return directory

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
        return Progress(
            last_logged_step=self._globalstep_last_logged,
            finished=self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            epoch_ended=self._epoch_ended,
            postponed_evaluation=evaluation,
            postponed_save=save,
            forwards=sparsity_of(self.model).counter.training_forwards,
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
                f"training.lr_scheduler_type: the scheduler's state cannot be saved in a checkpoint: {error}"
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
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without Accelerate's wrapper
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
                f"{checkpoint.directory}: was saved with {manifest.examples_per_step} examples per step, but this run "
                f"has {here}; set training.per_device_train_batch_size and training.gradient_accumulation_steps so "
                f"that their product with the {self._ranks.world_size} ranks is {manifest.examples_per_step}"
            )
        self._ranks.run_together(lambda: self._check_selection(checkpoint))
        load_partition(checkpoint, self._trained_parameters(), self._partition(), self._ranks)
        if manifest.scheduler is not None and self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(manifest.scheduler)
        deepspeed_state.restore_engine_counters(self.deepspeed, manifest.engine)
        deepspeed_state.restore_loss_scale(self.deepspeed, self.accelerator.scaler, manifest.loss_scale)
        sparsity = sparsity_of(self.model)
        sparsity.counter.training_forwards = manifest.progress.forwards
        self._ranks.run_together(lambda: load_buffers(checkpoint, self.model))
        refresh(unwrap(self.model))
        self._random_states = self._ranks.run_together(lambda: self._random_states_of(checkpoint))

    def _check_selection(self, checkpoint: Checkpoint) -> None:
        if not self.is_world_process_zero():
            return
        saved, here = checkpoint.manifest.adapter, self._adapter_description()
        # A checkpoint of version 0.1 has no buffers
        buffers = {*sparsity_of(self.model).buffers} - {*saved.get("modules_to_save", ())}
        here = here | {"modules_to_save": [name for name in here["modules_to_save"] if name not in buffers]}
        # Nor the fields of later rules
        saved = saved | {"tensors": described(saved.get("tensors", {}))}
        here = here | {"tensors": described(here["tensors"])}
        for key in ("tensors", "modules_to_save"):
            if saved.get(key) != here[key]:
                raise UserError(
                    f"{checkpoint.directory}: has another selection ({key} differ): resume with the `sparse` section "
                    "with which the run was started"
                )
        if different := differing_parameters(saved.get("base_fingerprint", {}), here["base_fingerprint"]):
            raise UserError(
                f"{checkpoint.directory}: was saved with a base model whose weights differ in '{different[0]}': "
                "resume with the base model with which the run was started"
            )

    def _random_states_of(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        if checkpoint.manifest.world_size == self._ranks.world_size:
            return read_random_states(checkpoint, self._ranks.rank)
        # With another number of ranks the saved states do not fit: each rank gets a new seed, the same at each resume.
        generator = torch.Generator().manual_seed(self.args.seed + checkpoint.step)
        seeds = torch.randint(2**62, (self._ranks.world_size,), generator=generator)
        return {"torch": torch.Generator().manual_seed(int(seeds[self._ranks.rank])).get_state()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing: `_prepare_for_training` loads the checkpoint, after it has created the partitions."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        random_states.restore(self._random_states)

    def _load_best_model(self) -> None:
        checkpoint = self._ranks.run_together(lambda: Checkpoint(self.state.best_model_checkpoint))
        parameters = self._trained_parameters()
        wait_for_prefetch(unwrap(self.model))
        load_partition(checkpoint, parameters, self._partition(), self._ranks, with_moments=False)
        self._ranks.run_together(lambda: load_buffers(checkpoint, self.model))
        refresh(unwrap(self.model))

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
        self._finish_last_save()
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


class _LoopCallback(TrainerCallback):
    """Tells the trainer where its loop is."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._epoch_ended = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if args.torch_compile and self._trainer.is_deepspeed_enabled:
            refresh(self._trainer.model)  # a compiled forward does not write the deltas
        self._trainer._end_step()
