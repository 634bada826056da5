"""The arguments of TRL's trainers for a recipe with an objective. TRL is imported only then."""

import dataclasses
import importlib
from functools import cache
from typing import Any, get_type_hints

import transformers

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.objective import GENERATING, TASKS
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.training import check_type

_CONFIGS = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "reward": "RewardConfig",
    "grpo": "GRPOConfig",
    "rloo": "RLOOConfig",
}
_OURS = {"max_length": "data.max_length"}
"""Settings of TRL that a recipe has elsewhere."""
_REFUSED = {
    "packing": "with TRL, packed examples see each other with most attention kernels",
    "sync_ref_model": "the reference of a sparse model is fixed",
    "use_vllm": "vLLM does not know the deltas of a sparse model",
    "model_init_kwargs": "the model is loaded as the section `model` says",
}


def trl_arguments(recipe: Recipe, settings: dict[str, Any]) -> tuple[type[transformers.TrainingArguments], dict]:
    """TRL's configuration of a recipe: its class, with `async_save`, and its arguments.

    Args:
        recipe: has an objective.
        settings: the arguments of a Trainer. Where TRL has another default than transformers, that of transformers
            holds.

    Raises UserError: TRL is not installed, or `training.trl` has an unknown key or a value of another type.
    """
    objective, given = recipe.training["objective"], recipe.training.get("trl") or {}
    config = config_class(objective)
    plain = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    known = {field.name for field in dataclasses.fields(config)} - plain.keys() - {"async_save"}
    kinds = get_type_hints(config)
    for key, value in given.items():
        if key in plain:
            raise UserError(f"training.trl.{key}: is an argument of every Trainer; write training.{key}")
        if key in _OURS:
            raise UserError(f"training.trl.{key}: write {_OURS[key]}")
        if key in _REFUSED and value:
            raise UserError(f"training.trl.{key}: {_REFUSED[key]}; leave it out")
        if key not in known:
            name = _CONFIGS[objective]
            raise UserError(f"training.trl: trl.{name} has no '{key}'{did_you_mean(key, known)}")
        check_type(f"training.trl.{key}", kinds[key], value)
    defaults = {name: plain[name] for name in ("logging_steps", "gradient_checkpointing", "bf16")}
    settings = defaults | settings | given
    if objective not in GENERATING:
        settings["max_length"] = recipe.data.max_length
    return config, settings


@cache
def config_class(objective: str) -> type[transformers.TrainingArguments]:
    """TRL's configuration class for an objective, with `async_save`. Raises UserError: TRL is not installed."""
    assert objective in TASKS
    try:
        base = getattr(importlib.import_module("trl"), _CONFIGS[objective])
    except ImportError as error:
        raise UserError(
            f"training.objective: {objective} needs TRL: pip install 'sparse-zero[trl]' ({error})"
        ) from None
    saving = ("async_save", bool, dataclasses.field(default=False))
    return dataclasses.make_dataclass(base.__name__, [saving], bases=(base,))
