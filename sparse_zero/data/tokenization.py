"""Tokenisation: pure functions from batches of raw columns to tokens and labels.

The `encode_*` functions have as arguments the batch that Dataset.map passes (a dict from column to the values of all
examples), the tokenizer, and the names of the columns. Those for language models return `input_ids` and `labels` of
equal length, where the label -100 excludes a token from the loss. They drop examples without any other label after the
first token, so the result may have fewer examples than the batch.
"""

import re
import reprlib
from collections.abc import Iterable
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from sparse_zero.errors import UserError

IGNORED = -100
"""The label of tokens that are excluded from the loss, the default `ignore_index` of torch's cross entropy."""

Batch = dict[str, list]


def encode_for_classification(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_pair: str | None,
    label: str,
    ids: dict[Any, int],
    max_length: int | None,
) -> Batch:
    """Tokenise for a classifier. Returns: the tokenizer's columns, and `labels` with the class ids."""
    pair = batch[text_pair] if text_pair else None
    encoded = tokenizer(batch[text], pair, truncation=max_length is not None, max_length=max_length)
    return {**encoded, "labels": [ids[value] for value in batch[label]]}


def encode_plain_text(batch: Batch, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None) -> Batch:
    """Tokenise plain text and append an end-of-sequence token. The loss is computed on all tokens."""
    encoded = [_with_eos(ids, tokenizer) for ids in tokenizer(batch[text], verbose=False).input_ids]
    return _truncated(zip(encoded, encoded, strict=True), max_length)


def encode_completions(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int | None
) -> Batch:
    """Tokenise prompts with completions. The loss is computed on the completion and its end-of-sequence token.

    Prompt and completion are tokenised separately, so that the tokens of the prompt are the same as in generation.
    """
    prompts = tokenizer(batch[prompt], verbose=False).input_ids
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        prompts = [ids[:-1] for ids in prompts]
    completions = tokenizer(batch[completion], add_special_tokens=False, verbose=False).input_ids
    examples = []
    for start, end in zip(prompts, completions, strict=True):
        end = _with_eos(end, tokenizer)
        examples.append((start + end, [IGNORED] * len(start) + end))
    return _truncated(examples, max_length)


def encode_conversations(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, messages: str, max_length: int | None
) -> Batch:
    """Tokenise conversations with the chat template. The loss is computed on the assistant's turns.

    If the template has {% generation %} markers, these are the tokens between them. Otherwise they are the tokens that
    a turn adds to the conversation before it with the generation prompt.

    Raises:
        UserError: the template fails on a conversation, or it has no markers and changes earlier turns as the
            conversation grows.
    """
    marked = tokenizer.is_fast and re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template())
    find_mask = _mask_by_markers if marked else _mask_by_prefixes
    examples = []
    for conversation in batch[messages]:
        if not (conversation and all(isinstance(turn, dict) and turn.get("role") for turn in conversation)):
            raise UserError(
                f"data.columns.messages: not a list of messages with role and content: {reprlib.repr(conversation)}"
            )
        try:
            ids, mask = find_mask(conversation, tokenizer)
        except (jinja2.TemplateError, TypeError) as error:
            shown = reprlib.repr(conversation)
            raise UserError(f"the chat template of {tokenizer.name_or_path} fails on {shown}: {error}") from error
        examples.append((ids, [id if trained else IGNORED for id, trained in zip(ids, mask, strict=True)]))
    return _truncated(examples, max_length)


def _mask_by_markers(conversation: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        conversation, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def _mask_by_prefixes(conversation: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    def render(turns: list[dict], **options) -> list[int]:
        return tokenizer.apply_chat_template(turns, return_dict=True, tokenizer_kwargs={"verbose": False}, **options)[
            "input_ids"
        ]

    ids = render(conversation)
    mask = [0] * len(ids)
    for position, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        before = render(conversation[:position], add_generation_prompt=True) if position else []
        through = render(conversation[: position + 1])
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} changes earlier turns, so the assistant's tokens "
                "cannot be found; put {% generation %} and {% endgeneration %} around them in the template"
            )
        mask[len(before) : len(through)] = [1] * (len(through) - len(before))
    return ids, mask


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _truncated(examples: Iterable[tuple[list[int], list[int]]], max_length: int | None) -> Batch:
    """Truncate (ids, labels) to `max_length` tokens, and drop examples without a token for the loss."""
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in examples]
    # The first token has no tokens before it to be predicted from, so its label is never used
    kept = [example for example in cut if any(label != IGNORED for label in example[1][1:])]
    return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}
