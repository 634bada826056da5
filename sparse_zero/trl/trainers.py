"""TRL's trainers of sparse models.

model = sparsify(AutoModelForCausalLM.from_pretrained(base), SparseConfig(density=0.01))
trainer = SparseDPOTrainer(model, args=DPOConfig("runs/dpo"), train_dataset=preferences, processing_class=tokenizer)
trainer.train()
trainer.save_model("runs/dpo/adapter")
"""

import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy, TrainOutput
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

from sparse_zero.errors import UserError, first_line
from sparse_zero.model.sparsity import sparsity_of
from sparse_zero.training.trainer import SparseTrainer
from sparse_zero.trl.reference_policy import ReferencePolicy, without_second_base
from sparse_zero.trl.trl_state import TRLState

logger = logging.getLogger(__name__)


class _TRLTrainer(SparseTrainer):
    """A SparseTrainer whose class also is one of TRL's trainers, which it calls."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """
        Args:
            model: a sparse model, see `sparsify`.
            objective, stop: see `SparseTrainer`.
            *args, **kwargs: as in TRL's trainer.

        Raises UserError: the model is not sparse, or the settings are those of another way to train.
        """
        if isinstance(model, str):
            raise UserError(f"{type(self).__name__}: load '{model}' and call sparsify on it: the model must be sparse")
        if kwargs.get("peft_config") is not None:
            raise UserError("peft_config: the model is sparse already, and has one adapter; leave it out")
        super().__init__(model, *args, **kwargs)
        self._check_head()
        self.add_callback(TRLState(self))

    def evaluation_results(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The loss, and TRL's metrics: rewards, margins, accuracies, the KL divergence."""
        figures = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
        return {
            key: value
            for key, value in figures.items()
            if isinstance(value, int | float) and not key.endswith(("runtime", "_per_second", "_time"))
        }

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's. Raises UserError: TRL does not know a name among its settings, which it notices only here."""
        try:
            return super().compute_loss(*args, **kwargs)
        except ValueError as error:
            if not str(error).startswith("Unknown"):
                raise
            raise UserError(f"training.trl: {first_line(error)}") from error

    def _check_head(self) -> None:
        """Raise UserError if TRL's head, which reads the output embedding itself, would not see its deltas."""
        head, names = self.model.get_output_embeddings(), sparsity_of(self.model).weights
        read = getattr(head, "_parameters", {}).get("weight")
        selected = [name for name, weight in names.items() if weight.weight is read and weight.is_partitioned]
        if selected:
            raise UserError(
                f"{selected[0]}: TRL reads the output embedding without its deltas at ZeRO stage 3: leave it out with "
                "sparse.exclude_modules, or use stage 2"
            )


class SparseSFTTrainer(_TRLTrainer, SFTTrainer):
    """trl.SFTTrainer of a sparse model."""


class SparseRewardTrainer(_TRLTrainer, RewardTrainer):
    """trl.RewardTrainer of a sparse model: a sequence classifier with one label."""


class _WithReference(_TRLTrainer):
    """A trainer that compares the policy with a reference, for which it needs no second model."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        theirs = self._class_of_trl()
        given = inspect.signature(theirs).bind_partial(model, *args, **_known(kwargs, theirs)).arguments
        if getattr(given.get("args"), "sync_ref_model", False):
            raise UserError("sync_ref_model: the reference of a sparse model is fixed; leave it out")
        if getattr(given.get("args"), "use_vllm", False):
            raise UserError("use_vllm: vLLM does not know the deltas of a sparse model; leave it out")
        if given.get("ref_model") is not None:
            super().__init__(model, *args, **kwargs)
            return
        with without_second_base(sys.modules[theirs.__module__]):
            super().__init__(model, *args, **kwargs)
        if self.beta or isinstance(self, DPOTrainer):
            self.ref_model = ReferencePolicy(self.model)

    @classmethod
    def _class_of_trl(cls) -> type[Trainer]:
        return next(base for base in cls.__mro__ if base.__module__.startswith("trl."))


def _known(arguments: dict[str, Any], function: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


class SparseDPOTrainer(_WithReference, DPOTrainer):
    """trl.DPOTrainer of a sparse model. Without `ref_model`, the reference is the model without its adapter, or with
    the adapter as it was loaded."""


class _SeededRepeatSampler(RepeatSampler):
    """TRL's sampler, whose order is a function of (seed, epoch): its own depends on how often it was iterated."""

    def __init__(self, sampler: RepeatSampler) -> None:
        vars(self).update(vars(sampler))
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


class _GeneratingTrainer(_WithReference):
    """A trainer that generates completions for several steps at once."""

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return _SeededRepeatSampler(super()._get_train_sampler(dataset))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As SparseTrainer.train. Raises UserError: a checkpoint would be saved between the generation of completions
        and the last step that trains on them."""
        steps = self._steps_per_generation
        if self.args.save_strategy == SaveStrategy.STEPS and self.args.save_steps % steps:
            raise UserError(
                f"training.save_steps: {self.args.save_steps:g}: completions are generated for {steps} steps "
                f"(steps_per_generation and num_iterations), and are not in checkpoints: use a multiple of {steps}"
            )
        return super().train(*args, **kwargs)

    @property
    def _steps_per_generation(self) -> int:
        """The number of optimizer steps on the same completions, rounded up."""
        return -(-self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if self._step % (self.args.steps_per_generation * self.num_iterations) and self.is_world_process_zero():
            logger.warning(
                "%s was saved between two generations: the completions of this step are generated again, so that the "
                "run is not what it would have been",
                self._resumed.directory,
            )

    def _count(self, inputs: Any) -> None:
        """Does nothing: `inputs` are the prompts of all steps of a generation."""

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.model.training:
            self._progress_shown.count(inputs)
        return inputs


class SparseGRPOTrainer(_GeneratingTrainer, GRPOTrainer):
    """trl.GRPOTrainer of a sparse model. With a `beta` above 0, the reference is as in SparseDPOTrainer."""


class SparseRLOOTrainer(_GeneratingTrainer, RLOOTrainer):
    """trl.RLOOTrainer of a sparse model. With a `beta` above 0, the reference is as in SparseDPOTrainer."""
