"""A transformers.Trainer that resumes from a sharded checkpoint: finds and checks it, restores what is in it."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from sparse_zero.adapters.schema import checked_config
from sparse_zero.checkpoint import deepspeed_state, random_states
from sparse_zero.checkpoint.branches import best_before, finish_leaving, leave_branch
from sparse_zero.checkpoint.directory import Checkpoint, newest_complete
from sparse_zero.checkpoint.export import describe_adapter, read_buffers
from sparse_zero.checkpoint.listing import MANIFEST_NAME
from sparse_zero.checkpoint.loader import load_partition, read_random_states
from sparse_zero.checkpoint.resume import DATA, LEARNING_RATE, OPTIMIZER
from sparse_zero.checkpoint.saved_state import fitted
from sparse_zero.checkpoint.settings import Settings, check_settings, differences, read_settings, settings_table
from sparse_zero.checkpoint.trainer_state import restore_callbacks
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differing_parameters
from sparse_zero.model.sparse_model import refresh
from sparse_zero.model.sparsity import set_values, sparsity_of
from sparse_zero.model.wrappers import unwrap
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.training.run_settings import count_examples, training_settings
from sparse_zero.training.schedule import rates_at, restored_rates
from sparse_zero.zero.parameters import wait_for_prefetch
from sparse_zero.zero.partitions import Partition

logger = logging.getLogger(__name__)


class ResumingTrainer(Trainer):
    """A Trainer of a sparse model that resumes exactly from checkpoints, or with what is reset taken from the run."""

    def __init__(self, *args: Any, settings: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Args: settings: of the run, besides its TrainingArguments: see `checkpoint.settings`."""
        super().__init__(*args, **kwargs)
        self._given_settings = dict(settings or {})
        self._ranks: Ranks | None = None
        self._resumed: Checkpoint | None = None
        self._reset: Collection[str] = ()
        self._first_step = 0
        """The step before the first one on the present training examples: not 0 if they were reset."""
        self._random_states: dict[str, torch.Tensor] = {}
        self._adapter: dict[str, Any] | None = None

    def _open(self, requested: str | Path | bool | None) -> Checkpoint | None:
        """The checkpoint from which the run resumes. A collective call."""
        self._ranks.on_first(lambda: finish_leaving(Path(self.args.output_dir)))
        found = self._ranks.on_first(lambda: self._find(requested))
        return self._ranks.run_together(lambda: Checkpoint(found) if found else None)

    def _find(self, requested: str | Path | bool | None) -> Path | None:
        if requested is None or requested is False:
            return None
        if requested is not True:
            return Path(requested)
        found, problems = newest_complete(Path(self.args.output_dir))
        for problem in problems:
            logger.warning("skipped: %s", problem)
        if found is None:
            raise UserError(f"{self.args.output_dir}: contains no complete checkpoint to resume from")
        return found.directory

    def _settings(self) -> Settings:
        """The settings of this run, as it will store them in its checkpoints. A collective call.

        Raises UserError: they do not allow to resume from the checkpoint.
        """
        here = {"training": training_settings(self.args), "examples": count_examples(self.train_dataset)}
        here |= self._given_settings
        checkpoint, self._first_step = self._resumed, 0
        if checkpoint is None:
            return here
        saved = self._ranks.on_first(lambda: read_settings(checkpoint))
        reset = {*self._reset, DATA} if self.args.ignore_data_skip else self._reset
        check_settings(checkpoint, saved, here, reset)
        found = differences(saved, here, reset)
        if found and self.is_world_process_zero():
            logger.warning("%s was saved with other settings:\n%s", checkpoint.directory, settings_table(found))
        for difference in found:
            if difference.is_restored:
                key = difference.key.split(".")[1]
                here["training"][key] = saved["training"][key]
        self._first_step = checkpoint.step if DATA in self._reset else saved.get("examples", {}).get("first_step", 0)
        here["examples"] = here["examples"] | {"first_step": self._first_step}
        return here

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, *args, **kwargs)
        if self._resumed is not None:
            self._find_best(self._resumed)
            if self._first_step and not self.args.ignore_data_skip:
                epochs, steps = divmod(self.state.global_step - self._first_step, steps_per_epoch)
                return epochs, steps * self.args.gradient_accumulation_steps
        return position

    def _find_best(self, checkpoint: Checkpoint) -> None:
        """Set `best_model_checkpoint` to the best one before a checkpoint. A collective call.

        It is gone if it was deleted for a better one after the checkpoint's step. Then the best of the steps to come
        is sought.
        """
        best = self._ranks.on_first(lambda: best_before(checkpoint))
        self.state.best_model_checkpoint = str(best) if best else None
        if best is None and self.state.best_global_step and self.args.load_best_model_at_end:
            if self.is_world_process_zero():
                logger.warning(
                    "the best checkpoint until step %d, that of step %d, is gone: the best of the later steps will be "
                    "loaded at the end",
                    checkpoint.step,
                    self.state.best_global_step,
                )
            self.state.best_metric = self.state.best_global_step = None

    def _load_callback_state(self) -> None:
        restore_callbacks(self.callback_handler.callbacks, self.state.stateful_callbacks, self._resumed.directory)

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
        if here != manifest.examples_per_step and not (self.args.ignore_data_skip or DATA in self._reset):
            raise UserError(
                f"{checkpoint.directory}: was saved with {manifest.examples_per_step} examples per step, but this run "
                f"has {here}; set training.per_device_train_batch_size and training.gradient_accumulation_steps so "
                f"that their product with the {self._ranks.world_size} ranks is {manifest.examples_per_step}"
            )
        # Everything is read and checked before anything is changed
        self._ranks.run_together(lambda: self._check_selection(checkpoint))
        states = self._ranks.run_together(lambda: self._random_states_of(checkpoint))
        buffers = self._ranks.run_together(lambda: self._read_buffers(checkpoint))
        engine, scaler, origin = self.deepspeed, self.accelerator.scaler, f"{checkpoint.directory}"
        scale = deepspeed_state.fitted_loss_scale(engine, scaler, manifest.loss_scale, f"{origin}: loss_scale")
        partition, scheduler = self._partition(), self._fitted_scheduler(checkpoint)
        initial = partition.learning_rates()
        load_partition(checkpoint, self._trained_parameters(), partition, self._ranks, OPTIMIZER not in self._reset)
        if LEARNING_RATE in self._reset:
            rates = rates_at(self.lr_scheduler, scheduler, manifest.step, initial)
        else:
            rates = restored_rates(self.lr_scheduler, scheduler, manifest.learning_rates)
        partition.set_learning_rates(rates)
        deepspeed_state.restore_engine_counters(engine, manifest.engine)
        deepspeed_state.restore_loss_scale(engine, scaler, scale)
        self._set_forwards(manifest.progress.forwards)
        self._put_buffers(buffers)
        self._random_states = states
        # Last, so that a resume that is refused moves nothing
        self._leave_branch()

    def _fitted_scheduler(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """The saved state of the scheduler, checked against this run's."""
        saved = checkpoint.manifest.scheduler
        if saved is None or self.lr_scheduler is None or LEARNING_RATE in self._reset:
            return saved
        return fitted(saved, self._scheduler_state(), f"{checkpoint.directory}: scheduler")

    def _leave_branch(self) -> None:
        """Move checkpoints aside that are not before this run's first step. A collective call."""
        output, resumed = Path(self.args.output_dir), self._resumed
        is_inside = resumed is not None and resumed.directory.resolve().parent == output.resolve()
        moved = self._ranks.on_first(lambda: leave_branch(output, resumed.step if is_inside else 0))
        if not moved:
            return
        if (best := self.state.best_model_checkpoint) is not None:
            new_paths = {old.resolve(): new for old, new in moved.items()}
            self.state.best_model_checkpoint = str(new_paths.get(Path(best).resolve(), best))
        if self.is_world_process_zero():
            names = ", ".join(path.name for path in moved)
            reason = f"newer than {resumed.directory.name}" if is_inside else "not of this run"
            logger.warning("moved %s (%s) to %s", names, reason, next(iter(moved.values())).parent)

    def _check_selection(self, checkpoint: Checkpoint) -> None:
        if not self.is_world_process_zero():
            return
        origin = f"{checkpoint.directory / MANIFEST_NAME}: adapter"
        if (method := checkpoint.manifest.adapter.get("method")) is not None:
            raise UserError(
                f"{checkpoint.directory}: is of training.method: {method}, not sparse: resume with the method with "
                "which the run was started"
            )
        saved = checked_config(checkpoint.manifest.adapter, origin).model_dump(mode="json")
        here = self._adapter_description()
        # A checkpoint of version 0.1 has no buffers
        buffers = {*sparsity_of(self.model).buffers} - {*saved["modules_to_save"]}
        here = here | {"modules_to_save": [name for name in here["modules_to_save"] if name not in buffers]}
        for key in ("tensors", "modules_to_save"):
            if saved[key] != here[key]:
                raise UserError(
                    f"{checkpoint.directory}: has another selection ({key} differ): resume with the `sparse` section "
                    "with which the run was started"
                )
        if different := differing_parameters(saved["base_fingerprint"], here["base_fingerprint"]):
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
        wait_for_prefetch(self.model)
        buffers = self._ranks.run_together(lambda: self._read_buffers(checkpoint))
        load_partition(checkpoint, parameters, self._partition(), self._ranks, with_moments=False)
        self._put_buffers(buffers)

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

    def _read_buffers(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        return read_buffers(checkpoint, self.model, sparsity_of(self.model).buffers)

    def _put_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Set the buffers of modules that are trained in full, and write the deltas into the weights."""
        set_values(unwrap(self.model), buffers)
        self._write_deltas()

    def _write_deltas(self) -> None:
        refresh(unwrap(self.model))

    def _forwards(self) -> int:
        """The training forward passes so far, which seed what is random in each."""
        return sparsity_of(self.model).counter.training_forwards

    def _set_forwards(self, count: int) -> None:
        sparsity_of(self.model).counter.training_forwards = count

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
