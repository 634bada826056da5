"""What a checkpoint stores of a run's settings: what determines its numbers, and nothing of its hosts and logs."""

import json
from collections.abc import Mapping, Sized
from typing import Any

import transformers
import xxhash

from sparse_zero.recipe.recipe import Recipe

_SECTIONS = ("model", "data", "sparse", "rpn")

_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("max_steps", "num_train_epochs"),
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "bf16", "fp16", "tf32"),
    *("metric_for_best_model", "greater_is_better"),
)

_SAMPLES = 64


def sections_of(recipe: Recipe) -> dict[str, Any]:
    """The sections of a recipe that determine what a run computes, as JSON."""
    return {name: recipe.model_dump(mode="json")[name] for name in _SECTIONS}


def training_settings(arguments: transformers.TrainingArguments) -> dict[str, Any]:
    """The arguments that determine what a run computes, as JSON."""
    values = arguments.to_dict()
    return json.loads(json.dumps({key: values[key] for key in _TRAINING if key in values}, default=str))


def describe_examples(dataset: Any) -> dict[str, Any]:
    """What tells training examples from others: {count, checksum of some of them}.

    Args: dataset: whose examples are the same whenever they are read.
    """
    count = len(dataset)
    digest = xxhash.xxh3_128()
    for index in sorted({index * count // _SAMPLES for index in range(_SAMPLES)} | {count - 1}) if count else ():
        digest.update(json.dumps(dataset[index], sort_keys=True, default=str).encode())
    return {"count": count, "checksum": digest.hexdigest()}


def count_examples(dataset: Any) -> Mapping[str, Any]:
    """{count}, of any training data; empty if the count is not known."""
    return {"count": len(dataset)} if isinstance(dataset, Sized) else {}
