"""What the other methods have written, opened again: adapters of PEFT and models, to evaluate or to merge."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sparse_zero.adapters.files import CONFIG_NAME
from sparse_zero.adapters.schema import PEFT_TYPE
from sparse_zero.data.models import load_model, resize_embeddings
from sparse_zero.errors import UserError
from sparse_zero.recipe.method import LOW_RANK, SPARSE, method_of
from sparse_zero.recipe.recipe import ModelSection, Recipe
from sparse_zero.training.low_rank import load_low_rank
from sparse_zero.training.plain_methods import Trained
from sparse_zero.zero.parameters import full_numel


def method_of_result(recipe: Recipe, directory: Path) -> str:
    """The method that wrote a directory: the recipe's, unless the directory's files are of another kind.

    A run may have got its method by an override.
    """
    method, kind = method_of(recipe.training), _peft_type(directory)
    if kind == "LORA":
        return method if method in LOW_RANK else LOW_RANK[0]
    if kind == PEFT_TYPE:
        return SPARSE
    is_model = (directory / "config.json").is_file() and not (directory / CONFIG_NAME).exists()
    return "full" if is_model and method not in ("full", "head") else method


def trained_section(recipe: Recipe, directory: Path) -> ModelSection:
    """The `model` section with which a result is opened: the base model for an adapter, else the written model.

    Args:
        recipe: whose method is not sparse.
        directory: an adapter of PEFT for lora and dora, else a model directory.

    Raises UserError: the directory contains something else.
    """
    section, method = recipe.model, method_of(recipe.training)
    if recipe.training.get("deepspeed") and recipe.training.get("bf16") and section.dtype is None:
        section = section.model_copy(update={"dtype": "bfloat16"})
    if method in LOW_RANK:
        if _peft_type(directory) != "LORA":
            raise UserError(f"{directory}: is not an adapter of training.method: {method}, which PEFT's LoRA writes")
        return section
    if not (directory / "config.json").is_file() or (directory / CONFIG_NAME).exists():
        raise UserError(f"{directory}: is not a model directory, as training.method: {method} writes it")
    given = {"name": str(directory), "gguf_file": None, "revision": None, "new_tokens": []}
    return section.model_copy(update=given)


def _peft_type(directory: Path) -> str | None:
    try:
        return json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None


def open_trained(recipe: Recipe, model: nn.Module, directory: Path) -> Trained:
    """A trained model as it is evaluated. Args: model: that of `trained_section`."""
    method, total = method_of(recipe.training), sum(full_numel(parameter) for parameter in model.parameters())
    if method in LOW_RANK:
        model = load_low_rank(model, str(directory))
    return Trained(method, model, total)


def merge_low_rank(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, adapter: str, merged: Path
) -> None:
    """Write the base model with a LoRA or DoRA adapter merged into its weights, in one process.

    Args:
        config: of the model that was trained, whose head has other labels than the base model's.
        adapter: its directory.
        merged: the directory to write.

    Raises UserError: the base model or the adapter cannot be loaded.
    """
    section = recipe.model
    settings: dict[str, Any] = {}
    if section.task == "sequence-classification":
        names = ("id2label", "label2id", "problem_type", "pad_token_id")
        settings = {name: getattr(config, name, None) for name in names}
    model = load_model(
        section.source,
        section.task,
        dtype=str(config.dtype).removeprefix("torch."),
        settings=settings,
        new_head=False,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    resize_embeddings(model, tokenizer)
    whole = load_low_rank(model, adapter).merge_and_unload()
    whole.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
