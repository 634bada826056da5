"""The methods that a recipe can compare sparse training with: LoRA and DoRA of PEFT, the whole model, its head only.

trained = apply_method(model, recipe, tokenizer, new_tokens, seed=0)
trained.model        # what the Trainer gets: the model, or a PeftModel around it
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import fingerprint
from sparse_zero.model.subclassed import prepare_plain
from sparse_zero.recipe.method import LOW_RANK, method_of
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.selection.targets import find_modules_to_save, parameter_names
from sparse_zero.training.low_rank import add_low_rank
from sparse_zero.zero.parameters import full_numel, wait_for_prefetch

logger = logging.getLogger(__name__)


@dataclass
class Trained:
    """A model that a method other than sparse trains."""

    method: str
    model: nn.Module
    """For LoRA and DoRA a PeftModel, else the model itself."""
    total_parameters: int
    """The number of scalars of the base model; tied parameters count once."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint must have in common with a run that resumes from it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the results say of the method."""
    fingerprint: dict[str, str] = field(default_factory=dict, repr=False)
    """Of the parameters of the base model that are not trained."""


def apply_method(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[str] = (),
    seed: int | None = None,
) -> Trained:
    """Make what the recipe's method trains trainable, and freeze the rest. Collective at ZeRO stage 3.

    Args:
        model: the base model, changed in place.
        recipe: whose method is not sparse.
        tokenizer, new_tokens: whose embeddings LoRA and DoRA train too.
        seed: of the matrices that LoRA draws; None: from the present random state.

    Raises UserError: PEFT is not installed or refuses the settings, there is no layer for it, or no head.
    """
    method = method_of(recipe.training)
    wait_for_prefetch(model)
    total = sum(full_numel(parameter) for parameter in model.parameters())
    if method not in LOW_RANK and getattr(model, "is_quantized", False):
        raise UserError(
            f"training.method: {method}: {recipe.model.source} is quantized, and the Trainer trains only adapters of "
            "such a model; choose lora, or a base model that is not quantized"
        )
    if method == "full":
        model.requires_grad_(True)
        return Trained(method, model, total)
    heads = find_modules_to_save(model, recipe.sparse)
    if method in LOW_RANK:
        prints = fingerprint(model, parameter_names(model, heads)) if not _is_meta(model) else {}
        if seed is not None:
            set_seed(seed)
        wrapped, settings, facts = add_low_rank(model, recipe, heads, tokenizer, new_tokens)
        prepare_plain(wrapped)
        return Trained(method, wrapped, total, settings, facts, prints)
    names, facts = _head(model, heads)
    prints = fingerprint(model, names) if not _is_meta(model) else {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return Trained(method, model, total, {"parameters": names}, facts, prints)


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _head(model: PreTrainedModel, heads: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The names of the parameters of the head, and facts: the modules that a sparse run trains in full (the
    classification head), or else the output embedding of a language model.
    """
    if heads:
        return parameter_names(model, heads), {}
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    of_head = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    if not of_head:
        raise UserError(f"training.method: head: {type(model).__name__} has no head of its own; choose another method")
    names = [name for name, parameter in model.named_parameters() if id(parameter) in of_head]
    if of_head.isdisjoint({id(parameter) for parameter in inputs.parameters()}):
        return names, {}
    logger.warning(
        "training.method: head: the head of %s is tied to its input embedding, which is trained with it",
        type(model).__name__,
    )
    return names, {"head_is_tied": True}
