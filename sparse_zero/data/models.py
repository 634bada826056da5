"""Base models and tokenizers from the hub, a local directory, an installed package or a GGUF file."""

import logging
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
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

from sparse_zero.data.gguf import gguf_config, model_path
from sparse_zero.data.quantization import (
    check_installed,
    from_transformers,
    transformers_config,
    warn_of_wrong_widths,
)
from sparse_zero.errors import UserError, first_line
from sparse_zero.quantized.methods import own_quantization
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.recipe.recipe import Task
from sparse_zero.zero.parameters import full_shape

logger = logging.getLogger(__name__)

AUTO_CLASS = {"sequence-classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}
"""The auto class of transformers that loads a model for a task."""


def task_of(class_name: str | None) -> Task | None:
    """The task of a class of transformers: "sequence-classification", "causal-lm", or None for others."""
    if class_name and class_name.endswith("ForSequenceClassification"):
        return "sequence-classification"
    return "causal-lm" if class_name and class_name.endswith(("ForCausalLM", "LMHeadModel")) else None


def load_model(
    name: str,
    task: Task,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    settings: Mapping[str, Any] | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base model with the head for a task. In a run with ZeRO stage 3 it is built under deepspeed.zero.Init.

    Weights that the model does not have (a new head) are initialised at random, with a warning unless they belong to
    a classifier's head.

    Args:
        name: a hub id, a directory, package://PACKAGE/PATH, or a GGUF file; see `model_path`.
        task: "causal-lm" or "sequence-classification".
        revision: of the hub's repository.
        dtype: "auto" for the dtype of the saved weights.
        settings: entries of the model's config to set (id2label, pad_token_id). Those of a file must have been
            checked: they are arguments of from_pretrained.
        new_head: initialise a classifier's head at random even if the checkpoint has one of this size.
        trust_remote_code: run Python code and kernels that the model names. Never take it from a file.
        quantization: quantise the linear layers; with all its keys, see `quantization.completed`.
        kwargs: for from_pretrained.

    Raises:
        UserError: the model cannot be loaded, is damaged, or has no head for the task.
    """
    settings = dict(settings or {})
    if "id2label" in settings:
        # JSON only has strings as keys
        settings["id2label"] = {int(index): label for index, label in settings["id2label"].items()}
    padding = settings.get("pad_token_id")
    verbosity = transformers_logging.get_verbosity()
    # No report on the missing weights of a new head, which is normal. Other missing weights are reported below.
    transformers_logging.set_verbosity_error()
    if quantization is not None:
        check_installed(quantization)
        kwargs["quantization_config"] = transformers_config(quantization)
    try:
        config = _read_config(name, revision, trust_remote_code)
        if (own := own_quantization(config)) is not None and (known := from_transformers(own)) is not None:
            check_installed(known, f"model.name: {name} is quantised")
        rows = getattr(config.get_text_config(), "vocab_size", None)
        if padding is not None and padding >= (rows or sys.maxsize):
            # An added token: `resize_embeddings` makes the row. Without it an embedding refuses its index.
            del settings["pad_token_id"]
        model, report = AUTO_CLASS[task].from_pretrained(
            _checked_path(name, revision),
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for a different number of labels is replaced by a new one
            **settings,
            **kwargs,
        )
    except UserError:
        raise
    except Exception as error:  # a model's own code and damaged files may raise any error
        raise UserError(f"model.name: {name} cannot be loaded for {task}: {_reason(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    warn_of_wrong_widths(model)
    prefix = f"{model.base_model_prefix}."
    for key, saved, expected in sorted(report["mismatched_keys"]):
        if key.startswith(prefix):
            raise UserError(
                f"model.name: {name} is damaged: {key} has the shape {list(saved)} instead of {list(expected)}, which "
                "config.json requires"
            )
    missing = sorted(key for key in report["missing_keys"] if task == "causal-lm" or key.startswith(prefix))
    if missing:
        logger.warning("%s has no weights for %s: they are initialised at random", name, ", ".join(missing))
    if new_head:
        _initialise_head(model)
    if padding is not None:
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
    return model


def _initialise_head(model: PreTrainedModel) -> None:
    """Initialise all parameters outside the base model as transformers does for a checkpoint without them."""
    prefix = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        own = [parameter for key, parameter in module.named_parameters() if not f"{name}.{key}".startswith(prefix)]
        if own:
            module._is_hf_initialized = False
        for parameter in own:
            parameter._is_hf_initialized = False
    model._initialize_missing_keys(is_quantized=getattr(model, "is_quantized", False))


def head_labels(config: PreTrainedConfig) -> dict[int, str] | None:
    """The classes of a checkpoint's own sequence classification head; None if it has none."""
    classes = config.architectures or []
    return dict(config.id2label) if any(task_of(name) == "sequence-classification" for name in classes) else None


def meta_model(
    config: PreTrainedConfig, task: Task, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model on the meta device: as from `load_model`, but without values.

    Raises:
        UserError: the model cannot be built, or has no head for the task.
    """
    try:
        with torch.device("meta"):
            return AUTO_CLASS[task].from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model's own code may raise any error
        raise UserError(f"model.name: {config.name_or_path} cannot be built for {task}: {_reason(error)}") from error


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer. One without a padding token gets its end-of-sequence token as padding token.

    Args: as of `load_model`; kwargs: for from_pretrained.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _checked_path(name, revision), revision=revision, trust_remote_code=trust_remote_code, **kwargs
        )
    except UserError:
        raise
    except Exception as error:  # a tokenizer's own code and damaged files may raise any error
        raise UserError(f"model.tokenizer: the tokenizer of {name} cannot be loaded: {_reason(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer, in place.

    Raises:
        UserError: the tokenizer has one of the tokens already.
    """
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise UserError(f"model.new_tokens: '{known[0]}' is already in the tokenizer's vocabulary")
    tokenizer.add_tokens(list(tokens), special_tokens=True)


def tokens_without_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens for which the model's input embedding has no row, in the order of their ids."""
    rows = full_shape(model.get_input_embeddings().weight)[0]
    return tokenizer.convert_ids_to_tokens(list(range(rows, len(tokenizer))))


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Resize the model's embeddings if the tokenizer has more tokens than they have rows, in place.

    Under ZeRO stage 3, all ranks must call it.
    """
    # Many models have unused rows
    if len(tokenizer) > full_shape(model.get_input_embeddings().weight)[0]:
        model.resize_token_embeddings(len(tokenizer))


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's config.

    Args: as of `load_model`.

    Raises:
        UserError: the config cannot be loaded, or names code that is not trusted.
    """
    try:
        return _read_config(name, revision, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a model's own code may raise any error
        raise UserError(f"model.name: {name} cannot be loaded: {_reason(error)}") from error


def _read_config(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """Raises UserError if the config names a kernel that is not trusted, and what from_pretrained raises."""
    config = gguf_config(name, revision)
    if config is not None:
        return config
    path = _checked_path(name, revision)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    kernels = [] if trust_remote_code else _kernels(config)
    if kernels:
        raise UserError(
            f"model.name: {name} asks for the kernel '{kernels[0]}', which transformers would download and run; "
            f"{_TRUST}"
        )
    return config


def _checked_path(name: str, revision: str | None) -> str:
    """The path of a model. Raises UserError if its directory has a pipe or device: transformers would wait for it."""
    path = model_path(name, revision)
    for entry in os.scandir(path) if os.path.isdir(path) else ():
        if entry.is_symlink() and not os.path.exists(entry.path):
            continue
        if not stat.S_ISREG(mode := entry.stat().st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{entry.path}: is not a file but a pipe or device")
    return path


def _kernels(config: PreTrainedConfig) -> list[str]:
    """The kernels of the hub, as `organisation/name`, that a config or a part of it names."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    names = (getattr(p, key, None) for p in parts for key in ("_attn_implementation", "_experts_implementation"))
    return [name for name in names if isinstance(name, str) and "/" in name]


def max_positions(config: PreTrainedConfig) -> int | None:
    """The maximum sequence length of a model in tokens; None if its config has none."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    # RoBERTa counts positions from padding_idx + 1
    reserved = text.pad_token_id + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return limit - reserved if limit else None


def check_max_length(tokens: int, model_limit: int | None) -> None:
    """Raise UserError if sequences of `tokens` are longer than the model's `max_positions`."""
    if model_limit is not None and tokens > model_limit:
        raise UserError(f"data.max_length: {tokens} tokens, but the model supports at most {model_limit}")


_TRUST = "if you trust its author, pass --trust-remote-code, or set model.trust_remote_code in a recipe"


def _reason(error: Exception) -> str:
    """The first line of an error's message; the last for an invalid config, whose first line only names a method."""
    if "trust_remote_code" in str(error):
        return f"it has Python code of its own, which is not run; {_TRUST}"
    if isinstance(error, StrictDataclassError):
        return str(error).strip().splitlines()[-1].strip()
    return first_line(error)
