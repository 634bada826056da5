"""LoRA and DoRA of PEFT on the layers of a recipe's `sparse` section. PEFT is imported only here, and when needed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_zero.errors import UserError, did_you_mean, first_line
from sparse_zero.model.wrappers import unwrap
from sparse_zero.recipe.method import method_of
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import Target, find_targets, is_linear
from sparse_zero.zero.parameters import full_numel

DEFAULT_RANK = 8
"""LoraConfig's own."""

ALPHA_OF_RANK = 2
"""lora_alpha over r where a budget chooses r: that of the runs in which the default learning rates were measured."""

_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def import_peft() -> Any:
    """The package PEFT. Raises UserError: it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"training.method: lora and dora need PEFT ({first_line(error)}); install sparse-zero[compare]"
        ) from None
    return peft


def add_low_rank(
    model: PreTrainedModel,
    recipe: Recipe,
    heads: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Wrap a model in a PeftModel with LoRA or DoRA.

    Args:
        model: the base model, changed in place.
        recipe: whose method is lora or dora.
        heads: the modules that are trained in full.
        tokenizer, new_tokens: whose embeddings are trained too.

    Returns: the PeftModel, the settings that its LoraConfig got, and facts for the results.

    Raises UserError: PEFT is not installed or refuses the settings, or there is no layer for it.
    """
    peft, training = import_peft(), recipe.training
    settings, facts = dict(training.get("lora") or {}), {}
    _check_names(settings, peft.LoraConfig)
    if settings.get("target_modules") is None and settings.get("target_parameters") is None:
        settings["target_modules"] = [*_layers(model, recipe, heads)]
    if training.get("budget") is not None:
        ranks, facts = _ranks(model, recipe, heads)
        settings = (_alphas(ranks) if "lora_alpha" not in settings else {}) | settings | ranks
    settings.setdefault("r", DEFAULT_RANK)
    if new_tokens and tokenizer is not None:
        settings["trainable_token_indices"] = sorted(tokenizer.convert_tokens_to_ids(list(new_tokens)))
    if heads:
        settings.setdefault("modules_to_save", list(heads))
    try:
        # PEFT writes into what it gets
        config = peft.LoraConfig(
            **{key: _copied(value) for key, value in settings.items()},
            task_type=_TASKS[recipe.model.task],
            use_dora=method_of(training) == "dora",
        )
        wrapped = peft.get_peft_model(model, config)
    except Exception as error:  # PEFT raises errors of many kinds
        raise UserError(f"training.lora: {first_line(error)}") from error
    config.base_model_name_or_path, config.revision = recipe.model.source, recipe.model.revision
    return wrapped, settings, {"rank": settings["r"]} | facts


def _check_names(settings: Mapping[str, Any], config: type) -> None:
    known = {each.name for each in dataclasses.fields(config) if each.init}
    for key in settings:
        if key not in known:
            raise UserError(f"training.lora: LoraConfig has no '{key}'{did_you_mean(key, known)}")


def _copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, list | dict) else value


def _layers(model: PreTrainedModel, recipe: Recipe, heads: Sequence[str]) -> dict[str, Target]:
    """By module name, the weights of the linear layers among the targets of the `sparse` section."""
    found = find_targets(model, recipe.sparse, heads)
    layers = {
        name.removesuffix(".weight"): target
        for name, target in found.items()
        if name.endswith(".weight") and is_linear(target.owners[0][0])
    }
    if not layers:
        raise UserError(
            "training.method: the targets of the section `sparse` have no linear layer, which LoRA needs; set "
            "training.lora.target_modules"
        )
    return layers


def _ranks(model: PreTrainedModel, recipe: Recipe, heads: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rank that `training.budget` asks for. Returns: settings of LoraConfig, and facts for the results."""
    training = recipe.training
    if (training.get("lora") or {}).keys() & {"target_modules", "target_parameters"}:
        raise UserError("training.budget: counts the layers of sparse.targets; leave training.lora.target_modules out")
    # The counts do not depend on the way to select, and the rows of new tokens train in full in every method
    sparse = recipe.sparse.model_copy(update={"selection": "stratified", "trainable_token_indices": None})
    selections, _ = select_scalars(model, sparse, list(heads))
    layers = {name: target.matrices for name, target in _layers(model, recipe, heads).items()}
    if training["budget"] == "equal-rank":
        return _equal_ranks(selections, layers)
    wanted = sum(selection.count for selection in selections)
    rank = rank_of_budget(wanted, [*layers.values()], has_magnitudes=method_of(training) == "dora")
    return {"r": rank}, {"sparse_parameters": wanted + _head_scalars(model, heads)}


def _alphas(ranks: Mapping[str, Any]) -> dict[str, Any]:
    """The lora_alpha of ranks that a budget has chosen: with a fixed one, a larger rank would learn more slowly."""
    if "r" not in ranks:
        return {}
    alphas = {"lora_alpha": ALPHA_OF_RANK * ranks["r"]}
    if "rank_pattern" in ranks:
        alphas["alpha_pattern"] = {name: ALPHA_OF_RANK * rank for name, rank in ranks["rank_pattern"].items()}
    return alphas


def rank_of_budget(wanted: int, layers: Sequence[tuple[int, int, int]], has_magnitudes: bool = False) -> int:
    """The rank with the number of scalars that is nearest to `wanted`; at least 1.

    Args:
        wanted: scalars besides those of the head.
        layers: (matrices, rows, columns) of each weight. A rank takes rows + columns scalars of each matrix.
        has_magnitudes: whether each row takes one more, as with DoRA.
    """
    fixed = sum(matrices * rows for matrices, rows, _ in layers) if has_magnitudes else 0
    of_rank = sum(matrices * (rows + columns) for matrices, rows, columns in layers)
    return max(1, round((wanted - fixed) / of_rank))


def _equal_ranks(
    selections: Sequence[Selection], layers: Mapping[str, tuple[int, int, int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The number of drawn columns of each weight, which bounds the rank of its change. Without drawn columns there is
    no such bound, and `training.lora.r` stays.
    """
    columns = {s.name.removesuffix(".weight"): s.columns.count for s in selections if s.columns is not None}
    ranks = {name: count for name, count in columns.items() if name in layers}
    if not ranks:
        return {}, {}
    return {"r": max(ranks.values()), "rank_pattern": ranks}, {"least_rank": min(ranks.values())}


def _head_scalars(model: PreTrainedModel, heads: Sequence[str]) -> int:
    parameters = {id(p): p for name in heads for p in model.get_submodule(name).parameters()}
    return sum(full_numel(parameter) for parameter in parameters.values())


def save_low_rank(model: nn.Module, directory: str, state: dict[str, Any] | None) -> None:
    """Write the adapter of a PeftModel. Args: state: its trained values by name, if ZeRO stage 3 partitions it."""
    # "auto" asks the hub for the base model's vocabulary; rows of new tokens are saved by themselves
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def load_low_rank(model: PreTrainedModel, directory: str) -> nn.Module:
    """Load a LoRA or DoRA adapter of PEFT into its base model. Raises UserError: it does not fit."""
    try:
        return import_peft().PeftModel.from_pretrained(model, directory)
    except UserError:
        raise
    except Exception as error:  # PEFT and safetensors raise errors of many kinds
        raise UserError(f"{directory}: cannot be loaded by PEFT: {first_line(error)}") from error


def trained_names(model: nn.Module) -> list[str]:
    """The names of the trained parameters in the model inside a PeftModel, as its checkpoints have them."""
    return [name for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad]
