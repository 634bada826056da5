"""The memory of the generation of completions, by GRPO and RLOO: the cache of keys and values, and the next tokens."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

COMPLETION_LENGTH = 512
"""TRL's default of `max_completion_length`."""

SAMPLING_BYTES = 3 * 4
"""Bytes per row and token of the vocabulary: the logits, a float32 copy, and the probabilities."""


@dataclass(frozen=True)
class Generation:
    """What a rank needs while it generates, in bytes."""

    cache: int
    """The keys and values of all tokens at the end of the completions."""
    next_tokens: int
    """What the next token of each row is sampled from."""
    formula: str
    """How `cache` was obtained."""
    gathers: bool
    """Whether TRL gathers the whole model at ZeRO stage 3 meanwhile: `ds3_gather_for_generation`."""


def completion_length(training: Mapping[str, Any]) -> int:
    """Tokens of a completion, by a recipe's `training` section."""
    return (training.get("trl") or {}).get("max_completion_length") or COMPLETION_LENGTH


def describe_generation(
    model: PreTrainedModel, training: Mapping[str, Any], micro_batch: int, micro_batches: int, tokens: int
) -> Generation:
    """What generation needs. TRL generates the completions of `steps_per_generation` micro-batches at once.

    Args:
        model: on the meta device.
        training: a recipe's section.
        micro_batch: completions of a micro-batch on a rank.
        micro_batches: micro-batches of a step.
        tokens: of a prompt with its completion.
    """
    settings = training.get("trl") or {}
    rows = micro_batch * (settings.get("steps_per_generation") or micro_batches)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    try:
        cache, formula = _cached(model, rows, tokens), "keys and values of all rows, counted on the meta device"
    except Exception:  # a model's own code may fail in any way without values
        logger.debug("the cache is estimated by a formula", exc_info=True)
        config = model.config.get_text_config()
        cache = 2 * config.num_hidden_layers * rows * tokens * config.hidden_size * model.dtype.itemsize
        formula = "2 * layers * b * s * h * width"
    gathers = settings.get("ds3_gather_for_generation", True)
    return Generation(cache, SAMPLING_BYTES * rows * vocabulary, formula, gathers)


@torch.no_grad()
def _cached(model: PreTrainedModel, rows: int, tokens: int) -> int:
    was_training = model.training
    model.eval()
    try:
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
        cache = model(input_ids=ids, use_cache=True).past_key_values
    finally:
        model.train(was_training)
    return sum(tensor.nbytes for tensor in cache_tensors(cache))


def cache_tensors(cache: Any) -> Iterator[torch.Tensor]:
    """The tensors of a cache of transformers."""
    for layer in cache.layers:
        yield from (value for value in vars(layer).values() if isinstance(value, torch.Tensor))
