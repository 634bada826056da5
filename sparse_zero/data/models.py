"""Base models and tokenizers, from the hub, a local directory or an installed package."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import Task
from sparse_zero.zero.parameters import full_shape

logger = logging.getLogger(__name__)

_AUTO_CLASS = {"sequence-classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}


def load_model(
    name: str,
    task: Task,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The base model with the head of its task, built under deepspeed.zero.Init where a stage 3 run is configured.

    Args: settings: entries of the model's configuration to set (id2label, pad_token_id); kwargs: for from_pretrained.
    Raises UserError: no such model, or one that has no such head.
    """
    settings = dict(settings or {})
    if "id2label" in settings:
        # JSON has made the keys strings
        settings["id2label"] = {int(index): label for index, label in settings["id2label"].items()}
    verbosity = transformers_logging.get_verbosity()
    # Its report on a new head's missing weights alarms people; what it would say of others is said below.
    transformers_logging.set_verbosity_error()
    try:
        model, report = _AUTO_CLASS[task].from_pretrained(
            package_path(name),
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for another number of labels is a new head
            **settings,
            **kwargs,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.name: {name} cannot be loaded for {task}: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    prefix = f"{model.base_model_prefix}."
    for key, saved, expected in sorted(report["mismatched_keys"]):
        if key.startswith(prefix):
            raise UserError(
                f"model.name: {name} is damaged: {key} has shape {list(saved)}, its config says {list(expected)}"
            )
    missing = sorted(key for key in report["missing_keys"] if task == "causal-lm" or key.startswith(prefix))
    if missing:
        logger.warning("%s has no weights for %s: they start at random", name, ", ".join(missing))
    return model


def model_without_values(
    config: PreTrainedConfig, task: Task, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """What `load_model` would load, on the meta device: names and shapes, no values.

    Raises UserError: a configuration that has no such head.
    """
    try:
        with torch.device("meta"):
            return _AUTO_CLASS[task].from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's own code makes of its settings
        raise UserError(
            f"model.name: {config.name_or_path} cannot be built for {task}: {_first_line(error)}"
        ) from error


def load_tokenizer(name: str, revision: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad: one without a padding token pads with its end-of-sequence token.

    Raises UserError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(package_path(name), revision=revision, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"model.tokenizer: {name} has no tokenizer that loads: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer, in place. Raises UserError: one that is there already."""
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise UserError(f"model.new_tokens: '{known[0]}' is in the tokenizer's vocabulary already")
    tokenizer.add_tokens(list(tokens), special_tokens=True)


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's embeddings a row for each token, in place. Collective under ZeRO stage 3."""
    # Many models have spare rows
    if len(tokenizer) > full_shape(model.get_input_embeddings().weight)[0]:
        model.resize_token_embeddings(len(tokenizer))


def load_config(name: str, revision: str | None = None, **kwargs: Any) -> PreTrainedConfig:
    """Raises UserError: no such model."""
    try:
        return AutoConfig.from_pretrained(package_path(name), revision=revision, **kwargs)
    except Exception as error:  # whatever a model's own code makes of its settings
        raise UserError(f"model.name: {name} cannot be loaded: {_first_line(error)}") from error


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a model takes; None where its configuration does not say."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    # RoBERTa counts positions from padding_idx + 1
    reserved = text.pad_token_id + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return limit - reserved if limit else None


def check_max_length(tokens: int, model_limit: int | None) -> None:
    """Raises UserError: more tokens than the model takes; None where its configuration does not say."""
    if model_limit is not None and tokens > model_limit:
        raise UserError(f"data.max_length: {tokens} tokens, but the model takes {model_limit} at most")


def _first_line(error: Exception) -> str:
    """Of a configuration that was refused the last one: the first says which method has refused it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()
