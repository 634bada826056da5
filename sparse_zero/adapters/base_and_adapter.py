"""The base model that an adapter names, with its tokenizer and the rows of new tokens."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.formats.base_model import check_base_model, check_no_adapter
from sparse_zero.adapters.schema import AdapterConfig
from sparse_zero.data.models import add_tokens, load_config, load_model, load_tokenizer, resize_embeddings
from sparse_zero.errors import UserError
from sparse_zero.quantized.methods import own_quantization


def load_base(
    adapter: Adapter, directory: str | Path, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the base model of an adapter as it was before training, and the tokenizer of the run.

    Args:
        adapter: names its base model and task.
        directory: the adapter's, for errors.
        trust_remote_code: see `load_model`.

    Returns: the model, and the tokenizer; None if the base model has none.

    Raises:
        UserError: the base model is not found, is not that of the adapter, or has an adapter of its own.
    """
    config = adapter.config
    check_base_model(adapter, directory, trust_remote_code)
    check_no_adapter(config.base_model_name_or_path, config.revision, directory)
    own = load_config(config.base_model_name_or_path, config.revision, trust_remote_code)
    model = load_model(
        config.base_model_name_or_path,
        config.task,
        quantization=config.quantization if own_quantization(own) is None else None,
        revision=config.revision,
        dtype=getattr(torch, config.dtype),
        settings=config.model_settings,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = _tokenizer_of(config, trust_remote_code)
    if config.new_tokens:
        # The base model's own tokenizer may have more tokens than its embedding has rows
        known = tokenizer.get_vocab()
        add_tokens(tokenizer, [token for token in config.new_tokens if token not in known])
        resize_embeddings(model, tokenizer)
    return model, tokenizer


def _tokenizer_of(config: AdapterConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the training run, else the base model's; None if the base model has none."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer, None, trust_remote_code)
    try:
        return load_tokenizer(config.base_model_name_or_path, config.revision, trust_remote_code)
    except UserError:
        if config.new_tokens:
            raise
        return None
