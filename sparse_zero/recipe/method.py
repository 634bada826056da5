"""The method of a recipe, `training.method`: sparse, or one to compare it with. Imports neither torch nor PEFT."""

from collections.abc import Mapping
from typing import Any

from sparse_zero.errors import UserError, did_you_mean

SPARSE = "sparse"
LOW_RANK = ("lora", "dora")
METHODS = (SPARSE, *LOW_RANK, "full", "head")

BUDGETS = ("same", "equal-rank")
"""What the rank of LoRA or DoRA is taken from. same: as many trained scalars as the `sparse` section gives, nearly.
equal-rank: the rank that the `sparse` section allows each weight, its number of drawn columns."""

KEYS = ("method", "lora", "budget")
"""The keys of `training` that belong to a method."""

_SET_HERE = ("peft_type", "task_type", "use_dora", "inference_mode", "base_model_name_or_path", "revision")
"""The options of LoraConfig that follow from the recipe."""


def method_of(training: Mapping[str, Any]) -> str:
    """The method of a recipe's `training` section."""
    return training.get("method") or SPARSE


def is_plain(training: Mapping[str, Any]) -> bool:
    """Whether the method trains parameters of a plain model: any but sparse."""
    return method_of(training) != SPARSE


def check_method(recipe: Any) -> None:
    """Raise ValueError if the method of a recipe does not go together with its other keys.

    Args: recipe: whose sections are valid by themselves.
    """
    training = recipe.training
    method, lora, budget = method_of(training), training.get("lora"), training.get("budget")
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS) or f"; known: {', '.join(METHODS)}"
        raise ValueError(f"training.method: unknown method '{method}'{hint}")
    for key, given in (("lora", lora), ("budget", budget)):
        if given is not None and method not in LOW_RANK:
            raise ValueError(f"training.{key}: only for training.method: lora and dora, not {method}; leave it out")
    if not isinstance(lora or {}, dict):
        raise ValueError("training.lora: must be a mapping of LoraConfig's settings, as in {r: 16}")
    for key in lora or {}:
        if key in _SET_HERE:
            raise ValueError(f"training.lora.{key}: follows from the recipe; leave it out")
    if budget is not None and budget not in BUDGETS:
        raise ValueError(f"training.budget: must be {' or '.join(BUDGETS)}, not {budget!r}")
    if budget == "same" and "r" in (lora or {}):
        raise ValueError("training.budget: same sets the rank; leave training.lora.r out")
    if method != SPARSE and training.get("objective") is not None:
        raise ValueError(f"training.method: {method} trains without an objective; leave training.objective out")
    if method == "head" and recipe.model.new_tokens:
        raise ValueError("training.method: head trains no rows of model.new_tokens; leave them out")


def refuse_method(training: Mapping[str, Any], what: str) -> None:
    """Raise UserError if a recipe's method is not sparse. Args: what: a command that knows no other."""
    if is_plain(training):
        raise UserError(f"{what}: only for sparse runs, not for training.method: {method_of(training)}")


def refuse_merge(training: Mapping[str, Any], merge: bool) -> None:
    """Raise UserError if --merge has nothing to merge. Args: merge: whether it was given."""
    if merge and method_of(training) in ("full", "head"):
        raise UserError(
            f"--merge: training.method: {method_of(training)} writes a plain model, to OUTPUT_DIR/model; leave it out"
        )
