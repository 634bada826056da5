"""Refuses data.packing for models whose packed examples see each other."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_zero.data.packing import leak_between_examples
from sparse_zero.errors import UserError, first_line

_ROUNDING = 1e-2
"""The largest relative change of logits that rounding causes: that of bfloat16, with room."""


class PackingCheck(TrainerCallback):
    """Checks the model before the first step, on the device and with the partitioning that it trains with."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_packed_examples(self._trainer, self._trainer.model_wrapped)


def check_packed_examples(trainer: Trainer, model: nn.Module) -> None:
    """Raise UserError if the model's logits for a packed example depend on the examples before it.

    Many architectures (OPT, BLOOM, Mamba, ...) ignore `position_ids` or do not tell examples apart by them; so does
    every model with a cache. A collective call at ZeRO stage 3.

    Args:
        trainer: gives the device, the dtype of autocast and the batch size.
        model: the model, or the engine that wraps it.
    """

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
        with trainer.compute_loss_context_manager():
            outputs = model(**batch)
        return outputs["logits"] if isinstance(outputs, dict) else outputs[0]

    config = trainer.model.config
    was_training = model.training
    model.eval()
    try:
        # The batch size decides whether transformers looks for packed examples
        rows = max(trainer.args.per_device_train_batch_size, trainer.args.per_device_eval_batch_size)
        leak = leak_between_examples(forward, config.get_text_config().vocab_size, rows=min(rows, 2))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.packing: {type(trainer.model).__name__} does not take packed examples ({first_line(error)}); "
            "set data.packing: false"
        ) from error
    finally:
        model.train(was_training)
    if not leak < _ROUNDING:
        raise UserError(
            f"data.packing: with {type(trainer.model).__name__} and {config._attn_implementation} attention packed "
            f"examples see each other (an example's logits change by {leak:.0%} with the one before it); set "
            "data.packing: false"
        )
