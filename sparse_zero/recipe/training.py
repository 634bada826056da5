"""The `training` section of a recipe: the fields of transformers.TrainingArguments and a few more."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

import transformers
from pydantic import TypeAdapter, ValidationError

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.objective import KEYS


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments with options for writing checkpoints and for the loss."""

    async_save: bool = field(
        default=False,
        metadata={
            "help": "Copy each checkpoint in memory and write it in the background. The next checkpoint waits for it."
        },
    )
    chunked_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute the loss of a causal language model without its logits, with "
            "torch.nn.functional.linear_cross_entropy (torch 2.13 or later). A step needs less memory, which matters "
            "for large vocabularies."
        },
    )


OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "packing": "data.packing",
}
"""What other programs call the arguments of a Trainer."""


def check_training(training: Mapping[str, Any]) -> None:
    """Check the `training` section of a recipe.

    Types are checked here because TrainingArguments accepts e.g. a string as learning rate. The optimizer would fail
    on it later, after the data has been prepared.

    Raises:
        UserError: TrainingArguments has no field of this name, or a boolean or number has another type.
    """
    known = {each.name for each in fields(TrainingArguments) if each.init}
    kinds = get_type_hints(TrainingArguments)
    for key, value in training.items():
        if key in KEYS:
            continue
        if key not in known:
            meant = (
                f"; did you mean '{OTHER_NAMES[key]}'?" if key in OTHER_NAMES else did_you_mean(key, known | {*KEYS})
            )
            raise UserError(
                f"unknown key '{key}' in section 'training'{meant} "
                "(the keys are the fields of transformers.TrainingArguments)"
            )
        check_type(f"training.{key}", kinds[key], value)


def check_type(key: str, kind: Any, value: Any) -> None:
    """Raise UserError if a boolean or number has another type. Args: kind: a type, or a union of such and None."""
    if not {*(get_args(kind) or [kind])} - {type(None)} <= {bool, int, float}:
        return
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"{key}: {problem[0].lower()}{problem[1:]}, not {value!r}") from None


def default_of(key: str) -> Any:
    """The default of a field of TrainingArguments."""
    return next(each.default for each in fields(TrainingArguments) if each.name == key)
