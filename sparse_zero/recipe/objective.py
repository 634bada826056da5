"""The objective of a recipe, `training.objective`: TRL's supervised fine-tuning, DPO, reward models, GRPO and RLOO.

Its keys stand in the `training` section. Imports neither torch nor TRL.
"""

from collections.abc import Mapping
from typing import Any

from rpn.config import file_of
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe import method

TASKS = {
    "sft": "causal-lm",
    "dpo": "causal-lm",
    "reward": "sequence-classification",
    "grpo": "causal-lm",
    "rloo": "causal-lm",
}
"""The task of the model for each objective."""

PAIRS = ("dpo", "reward")
"""The objectives of which an example is two sequences."""

GENERATING = ("grpo", "rloo")
"""The objectives that generate completions, and have reward functions."""

KEYS = ("objective", "trl", "reward_funcs", *method.KEYS)
"""The keys of `training` that are not arguments of a Trainer."""

_COLUMNS = {
    "sft": "`text`, `prompt` + `completion`, or `messages`",
    "dpo": "`chosen` and `rejected`, and `prompt` unless they contain it",
    "reward": "`chosen` and `rejected`, and `prompt` unless they contain it",
    "grpo": "`prompt`",
    "rloo": "`prompt`",
}
_ROLES = {
    "sft": [{"text"}, {"prompt", "completion"}, {"messages"}, {"messages", "tools"}],
    "dpo": [{"chosen", "rejected"}, {"prompt", "chosen", "rejected"}],
    "reward": [{"chosen", "rejected"}, {"prompt", "chosen", "rejected"}],
    "grpo": [{"prompt"}],
    "rloo": [{"prompt"}],
}


def reward_functions(training: Mapping[str, Any]) -> list[str]:
    """The names of the reward functions, as MODULE:FUNCTION or FILE.py:FUNCTION."""
    given = training.get("reward_funcs") or []
    return list(given) if isinstance(given, list) else [given]


def reward_files(training: Mapping[str, Any]) -> dict[str, str]:
    """The files of the reward functions, by key."""
    files = {f"training.reward_funcs.{n}": file_of(str(name)) for n, name in enumerate(reward_functions(training))}
    return {key: file for key, file in files.items() if file is not None}


def with_reward_files(training: dict[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """A copy of the section that names other files. Args: paths: by the keys of `reward_files`."""
    names = reward_functions(training)
    for n, name in enumerate(names):
        if (path := paths.get(f"training.reward_funcs.{n}")) is not None:
            names[n] = f"{path}:{str(name).rpartition(':')[2]}"
    return training | {"reward_funcs": names} if names else training


def task_of_objective(recipe: Any) -> str | None:
    """The task that the objective of a recipe, as it was read, determines; None if it has no known objective."""
    training = recipe.get("training") if isinstance(recipe, dict) else None
    objective = training.get("objective") if isinstance(training, dict) else None
    return TASKS.get(objective) if isinstance(objective, str) else None


def check_objective(recipe: Any) -> None:
    """Raises ValueError: the other settings of a recipe, a `Recipe`, do not fit its objective."""
    training = recipe.training
    objective, columns = training.get("objective"), recipe.data.columns
    if objective is None:
        for key in ("trl", "reward_funcs"):
            if training.get(key) is not None:
                raise ValueError(f"training.{key}: needs training.objective ({', '.join(TASKS)})")
        if columns.chosen or columns.rejected:
            raise ValueError("data.columns: `chosen` and `rejected` need training.objective: dpo or reward")
        return
    if objective not in TASKS:
        hint = did_you_mean(str(objective), TASKS) or f"; known: {', '.join(TASKS)}"
        raise ValueError(f"training.objective: unknown objective '{objective}'{hint}")
    if recipe.model.task != TASKS[objective]:
        raise ValueError(f"model.task: {objective} trains a model for {TASKS[objective]}; leave the task out")
    if columns.model_dump(exclude_none=True).keys() not in _ROLES[objective]:
        raise ValueError(f"data.columns: {objective} needs {_COLUMNS[objective]}, and no other column")
    if isinstance(columns.prompt, list):
        raise ValueError(f"data.columns.prompt: {objective} takes one column, not a list")
    if recipe.rpn is not None and objective not in ("sft", "reward"):
        raise ValueError(f"rpn: position noise is for the objectives sft and reward, not {objective}; leave it out")
    if recipe.data.packing:
        raise ValueError(f"data.packing: {objective} does not pack examples; leave it out, or the objective")
    if recipe.data.max_length is not None and objective in GENERATING:
        raise ValueError(f"data.max_length: {objective} truncates no prompts; set training.trl.max_completion_length")
    if recipe.sparse.uses_gradients:
        raise ValueError(
            f"sparse.selection: {recipe.sparse.selection} computes the gradients of a recipe without "
            f"training.objective, not of {objective}; use another selection"
        )
    if not isinstance(training.get("trl") or {}, dict):
        raise ValueError("training.trl: must be a mapping of TRL's settings")
    _check_rewards(objective, training)


def _check_rewards(objective: str, training: Mapping[str, Any]) -> None:
    names = reward_functions(training)
    if objective not in GENERATING and names:
        raise ValueError(f"training.reward_funcs: only {' and '.join(GENERATING)} have them, not {objective}")
    if objective in GENERATING and not names:
        raise ValueError(
            f"training.reward_funcs is missing: {objective} needs MODULE:FUNCTION or FILE.py:FUNCTION, or a list"
        )
    for name in names:
        if not isinstance(name, str) or not all(name.rpartition(":")[::2]):
            raise ValueError(f"training.reward_funcs: write MODULE:FUNCTION or FILE.py:FUNCTION, not {name!r}")


def refuse_objective(training: Mapping[str, Any], what: str) -> None:
    """Raise UserError if a recipe's `training` section has an objective. Args: what: a command that knows none."""
    if (objective := training.get("objective")) is not None:
        raise UserError(f"{what}: not for training.objective: {objective}")
