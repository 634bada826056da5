"""The Trainer for sparse models. It saves adapters, and its objective may make several passes over a batch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import has_length

from sparse_zero.adapters.hub import keep_edits
from sparse_zero.adapters.save_and_load import save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsity import sparsity_of
from sparse_zero.model.wrappers import unwrap
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.method import SPARSE
from sparse_zero.training.build import evaluation_results
from sparse_zero.training.further_evaluation import FurtherData
from sparse_zero.training.loss_options import chunked_loss
from sparse_zero.training.preemptible_trainer import PreemptibleTrainer
from sparse_zero.training.progress import JobProgress, count_batch
from sparse_zero.training.tensorboard import ResumableTensorBoardCallback
from sparse_zero.training.trackers import TrackedSettings
from sparse_zero.zero.parameters import fit_buckets

Forward = Callable[[], torch.Tensor]
Backward = Callable[[torch.Tensor, bool], None]
Objective = Callable[[Forward, Backward, int, int], torch.Tensor]
"""objective(forward, backward, step, micro_step) calls forward() and backward(loss, last) for each of its passes, and
returns the loss to report, a scalar tensor. `last` is True for the final pass only, in which gradients are
synchronised."""


class SparseTrainer(PreemptibleTrainer):
    """A transformers.Trainer that saves a sparse model as an adapter. The frozen base model is never written."""

    def __init__(self, model: nn.Module, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        """
        Args:
            model: a sparse model, see `sparsify`.
            objective: replaces the single pass over each batch; see `Objective`.
            stop: see `PreemptibleTrainer`.
            *args, **kwargs: as in transformers.Trainer.

        Raises UserError: the model is not sparse, its quantised weights cannot be trained with these arguments, or a
            setting of the loss does not fit; see `loss_options`.
        """
        self._check_model(model)
        # Models such as GPT-2 divide their loss by num_items_in_batch, but transformers does not recognise their
        # names.
        inner = unwrap(model)
        for _, layer in quantized_layers(inner):
            layer.check()  # the arguments may ask for stage 3, which `sparsify` could not know
        if type(inner).__name__.endswith("LMHeadModel") and getattr(inner, "loss_type", None) is None:
            inner.loss_type = "ForCausalLM"
        super().__init__(model, *args, **kwargs)
        self._chunked_loss = chunked_loss(inner, self.args, self.compute_loss_func)
        if self.is_deepspeed_enabled:
            fit_buckets(self.accelerator.state.deepspeed_plugin.deepspeed_config, model)
        self.objective = objective
        self._micro_step = 0
        self.further = FurtherData()
        # Nearly every forward accepts **kwargs, but only the causal loss divides by num_items_in_batch. For other
        # models the Trainer would multiply the loss, and the gradient, by the number of ranks.
        if not self._loss_shifts_labels:
            self.model_accepts_loss_kwargs = False
        self._progress_shown = JobProgress()
        self._replace_callback(ProgressCallback, self._progress_shown)
        self._replace_callback(PrinterCallback, self._progress_shown)
        if "tensorboard" in self.args.report_to:
            self._replace_callback(TensorBoardCallback, ResumableTensorBoardCallback(lambda: self._writer.run))
        self.add_callback(TrackedSettings())

    def _check_model(self, model: nn.Module) -> None:
        """Raise UserError: the model is not sparse."""
        sparsity_of(model)

    def _replace_callback(self, stock: type[TrainerCallback], ours: TrainerCallback) -> None:
        """Replace the Trainer's own callback. Subclasses, such as the one for notebooks, stay."""
        callbacks = self.callback_handler.callbacks
        index = next((index for index, callback in enumerate(callbacks) if type(callback) is stock), None)
        if index is not None:
            callbacks[index] = ours

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self._count(inputs)
        if self.objective is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        scale = 1 if self._scales_loss(num_items_in_batch) else self.current_gradient_accumulation_steps
        synchronise = self.accelerator.sync_gradients

        def forward() -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return loss / scale

        def backward(loss: torch.Tensor, last: bool) -> None:
            self.accelerator.gradient_state._set_sync_gradients(synchronise and last)
            # As in Trainer.training_step: forward has already divided the loss
            kwargs = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
            self.accelerator.backward(loss, **kwargs)

        loss = self.objective(forward, backward, self.state.global_step, self._micro_step)
        self._micro_step = 0 if synchronise else self._micro_step + 1
        return loss.detach()

    def _count(self, inputs: Any) -> None:
        """Count a batch for the progress and the results."""
        self._tokens += count_batch(inputs)[1]
        self._progress_shown.count(inputs)

    def _scales_loss(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `compute_loss` divides by the accumulated batches, as in Trainer.training_step."""
        if (scales := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            return scales
        return self.model_accepts_loss_kwargs and num_items_in_batch is not None

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer.get_train_dataloader. Raises UserError if it has no batch, so that no step could be taken."""
        loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            raise UserError(
                f"training.dataloader_drop_last: {len(self.train_dataset)} training examples are fewer than the "
                f"{self._train_batch_size} x {self.args.world_size} of one batch on each rank, so no step would be "
                "taken; reduce training.per_device_train_batch_size or leave dataloader_drop_last out"
            )
        return loader

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """Evaluations use every example: dataloader_drop_last is for training."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As Trainer.compute_loss. In training with `chunked_loss` there are no logits."""
        # An evaluation needs the logits
        in_chunks = self._chunked_loss is not None and self.model.training and not return_outputs
        if not in_chunks or inputs.get("labels") is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        with self._chunked_loss.computing(inputs, items):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_results(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What a run's results contain of what `evaluate` returned."""
        return evaluation_results(metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter. A collective call.

        Args: output_dir: the adapter's directory; None: the Trainer's output directory.
        """
        output_dir = output_dir or self.args.output_dir
        save_adapter(self.model, output_dir, is_main_process=self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Adapter save", revision=self.args.hub_revision)

    def count_parameters(self) -> tuple[int, int]:
        """The number of trained scalars, and of all scalars of the base model."""
        sparsity = sparsity_of(self.model)
        return sparsity.trainable_parameters, sparsity.total_parameters

    def method_facts(self) -> dict[str, Any]:
        """What the results say of the method."""
        return {"method": SPARSE}

    def save_result(self, output: Path, facts: dict[str, Any]) -> dict[str, str]:
        """Write what the run is for. A collective call.

        Args:
            output: the run's directory.
            facts: of the run, for the model card.

        Returns: the path, by `adapter` or `model`.
        """
        sparsity_of(self.model).results = facts
        self.save_model(str(output / "adapter"))
        return {"adapter": str(output / "adapter")}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the adapter's card, and what a person wrote into it on the hub. transformers would write another."""
        if self.hub_model_id is not None:
            keep_edits(self.args.output_dir, self.hub_model_id, self.args.hub_revision, self.args.hub_token)
