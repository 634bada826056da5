"""The `training` section's names: transformers.TrainingArguments' own, and ours."""

from dataclasses import dataclass, field

import transformers


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments that also say how checkpoints are written."""

    async_save: bool = field(
        default=False,
        metadata={"help": "Copy a checkpoint and write it in the background; the next one waits for it."},
    )
