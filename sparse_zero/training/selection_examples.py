"""The examples whose gradients select the trained scalars of a recipe with `sparse.selection: gradient` or `snip`."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.export import read_positions
from sparse_zero.data.datasets import PreparedData
from sparse_zero.errors import UserError
from sparse_zero.model.gradients import by_gradient, own_loss
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.selector import Choose
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import is_partitioned


def choose_by_examples(
    model: PreTrainedModel,
    config: SparseConfig,
    prepared: PreparedData,
    arguments: TrainingArguments,
    checkpoint: Checkpoint | None = None,
) -> Choose | None:
    """What selects the scalars of a model before it is made sparse.

    The examples are drawn with `config.seed` and computed one at a time, so that the choice depends neither on the
    number of ranks nor on the batch size. A resumed run takes the positions of its checkpoint.

    Returns: None if no examples are needed.
    """
    if not config.uses_gradients:
        return None
    if checkpoint is not None:
        return _of_checkpoint(checkpoint)
    if model.device != arguments.device and not any(map(is_partitioned, model.parameters())):
        model.to(arguments.device)
    halves = arguments.bf16 and model.dtype == torch.float32
    precision = torch.autocast(arguments.device.type, torch.bfloat16, enabled=halves)

    def loss(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
        with precision:
            return own_loss(model, batch)

    return by_gradient(model, _batches(model, config, prepared), config.selection == "snip", loss)


def _batches(model: PreTrainedModel, config: SparseConfig, prepared: PreparedData) -> Iterator[dict[str, Any]]:
    examples = prepared.train
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed))
    taken = {*inspect.signature(model.forward).parameters, "labels"}  # as the Trainer does
    for index in order[: config.selection_examples].tolist():
        batch = prepared.collator([examples[index]])
        yield {name: value for name, value in batch.items() if name in taken}


def _of_checkpoint(checkpoint: Checkpoint) -> Choose:
    def choose(
        targets: Mapping[str, Target], counts: Mapping[str, int], rows: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        positions = read_positions(checkpoint)
        for name, count in counts.items():
            if name not in positions or positions[name].numel() != count:
                raise UserError(
                    f"{checkpoint.directory}: the checkpoint trains other scalars of {name}; use the recipe that it "
                    "was saved with"
                )
        return {name: positions[name] for name in counts}

    return choose
