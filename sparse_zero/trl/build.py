"""From a recipe with an objective to one of TRL's trainers of sparse models."""

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from sparse_zero.data.models import load_config, max_positions
from sparse_zero.data.trl_columns import load_trl_splits
from sparse_zero.errors import UserError, first_line
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.recipe.objective import GENERATING
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.build import build_model, build_tokenizer
from sparse_zero.training.rewards import load_rewards
from sparse_zero.training.run import make_sparse, noisy_objective
from sparse_zero.training.run_settings import describe_examples, sections_of
from sparse_zero.training.trainer import SparseTrainer
from sparse_zero.trl.trainers import (
    SparseDPOTrainer,
    SparseGRPOTrainer,
    SparseRewardTrainer,
    SparseRLOOTrainer,
    SparseSFTTrainer,
)

_TRAINERS = {
    "sft": SparseSFTTrainer,
    "dpo": SparseDPOTrainer,
    "reward": SparseRewardTrainer,
    "grpo": SparseGRPOTrainer,
    "rloo": SparseRLOOTrainer,
}


def build_trl_trainer(recipe: Recipe, arguments: TrainingArguments, stop: StopRequest | None) -> SparseTrainer:
    """The trainer of a recipe with an objective. A collective call.

    Args: as of `training.run.build_trainer`.

    Raises UserError: the data, the model or a setting of TRL is not valid.
    """
    objective = recipe.training["objective"]
    rewards = load_rewards(recipe)
    tokenizer = build_tokenizer(recipe)
    with arguments.main_process_first(desc="data"):
        train, evaluation = load_trl_splits(recipe.data, keeps_others=objective in GENERATING)
    settings: dict[str, Any] = {}
    if objective == "reward":
        settings = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    model, new_tokens = build_model(recipe, arguments, tokenizer, settings, new_head=False)
    make_sparse(model, recipe, tokenizer, new_tokens)
    if getattr(arguments, "max_length", 0) is None:
        arguments.max_length = _limit(recipe, tokenizer)
    given: dict[str, Any] = {"reward_funcs": rewards} if objective in GENERATING else {}
    if recipe.rpn is not None:
        given["objective"] = noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids)
    try:
        return _TRAINERS[objective](
            model,
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            stop=stop,
            settings=sections_of(recipe) | {"examples": describe_examples(train), "objective": _settings(recipe)},
            **given,
        )
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"training.objective: {objective}: {first_line(error)}") from error


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint stores of the objective."""
    return {"name": recipe.training["objective"], **(recipe.training.get("trl") or {})}


def _limit(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that an example may have without `data.max_length`."""
    section = recipe.model
    config = load_config(section.source, section.revision, trust_remote_code=section.trust_remote_code)
    limits = [max_positions(config), tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)
