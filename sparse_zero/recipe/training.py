"""The `training` section's names: transformers.TrainingArguments' own, and ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

import transformers
from pydantic import TypeAdapter, ValidationError

from sparse_zero.errors import UserError, did_you_mean


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments that also say how checkpoints are written."""

    async_save: bool = field(
        default=False,
        metadata={"help": "Copy a checkpoint and write it in the background; the next one waits for it."},
    )


def check_training(training: Mapping[str, Any]) -> None:
    """Raises UserError: a name that TrainingArguments does not have, or no number where it has one.

    It takes a string for a learning rate, and the optimizer fails on it after the data is ready.
    """
    known = {each.name for each in fields(TrainingArguments) if each.init}
    kinds = get_type_hints(TrainingArguments)
    for key, value in training.items():
        if key not in known:
            raise UserError(
                f"unknown key '{key}' in section 'training'{did_you_mean(key, known)} "
                "(the names are those of transformers.TrainingArguments)"
            )
        if kinds[key] in (bool, int, float):
            try:
                TypeAdapter(kinds[key]).validate_python(value, strict=True)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise UserError(f"training.{key}: {problem[0].lower()}{problem[1:]}, not {value!r}") from None


def default_of(key: str) -> Any:
    """What TrainingArguments has where a recipe says nothing."""
    return next(each.default for each in fields(TrainingArguments) if each.name == key)
