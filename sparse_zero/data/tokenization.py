"""Tokenisation: pure functions from batches of raw columns to tokens and labels.

The `encode_*` functions have as arguments the batch that Dataset.map passes (a dict from column to the values of all
examples), the tokenizer, and the names of the columns. Those for language models return `input_ids` and `labels` of
equal length, where the label -100 excludes a token from the loss. `dropped` is the reason why an example cannot be
used, or "".
"""

import reprlib
from collections.abc import Iterable

import jinja2
from transformers import PreTrainedTokenizerBase

from sparse_zero.data.conversations import as_messages, as_tools, render, role_in_template
from sparse_zero.data.labels import Labels
from sparse_zero.errors import UserError

IGNORED = -100
"""The label of tokens that are excluded from the loss, the default `ignore_index` of torch's cross entropy."""

NO_TOKEN, NO_TARGET = "are empty: they have no token", "have no token to train on"
"""Reasons why an example is dropped."""

Batch = dict[str, list]


def encode_for_classification(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_pair: str | None,
    label: str,
    labels: Labels,
    split: str,
    max_length: int | None,
) -> Batch:
    """Tokenise for a classifier. Returns: the tokenizer's columns, `labels` for the loss, and `dropped`."""
    pair = batch[text_pair] if text_pair else None
    encoded = tokenizer(batch[text], pair, truncation=max_length is not None, max_length=max_length)
    dropped = ["" if ids else NO_TOKEN for ids in encoded["input_ids"]]
    return {**encoded, "labels": labels.targets(split, batch[label]), "dropped": dropped}


def encode_plain_text(batch: Batch, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None) -> Batch:
    """Tokenise plain text and append an end-of-sequence token. The loss is computed on all tokens."""
    encoded = [_with_eos(ids, tokenizer) for ids in tokenizer(batch[text], verbose=False).input_ids]
    return _truncated(((ids, ids, "") for ids in encoded), max_length)


def encode_completions(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, prompt: str | list[str], completion: str, max_length: int | None
) -> Batch:
    """Tokenise prompts with completions. The loss is computed on the completion and its end-of-sequence token.

    Several columns of a prompt are joined by an empty line; those without a value are left out.

    Prompt and completion are tokenised separately, so that the tokens of the prompt are the same as in generation.
    """
    columns = [batch[column] for column in ([prompt] if isinstance(prompt, str) else prompt)]
    texts = ["\n\n".join(filter(None, parts)) for parts in zip(*columns, strict=True)]
    prompts = tokenizer(texts, verbose=False).input_ids
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        prompts = [ids[:-1] for ids in prompts]
    completions = tokenizer(batch[completion], add_special_tokens=False, verbose=False).input_ids
    examples = []
    for start, end in zip(prompts, completions, strict=True):
        end = _with_eos(end, tokenizer)
        examples.append((start + end, [IGNORED] * len(start) + end, ""))
    return _truncated(examples, max_length)


def encode_conversations(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, messages: str, tools: str | None, max_length: int | None
) -> Batch:
    """Tokenise conversations with the chat template. The loss is computed on the assistant's turns.

    `renamed` has the roles of each conversation that have another name in chat templates: "gpt -> assistant; ...".

    Raises:
        UserError: a conversation or its tools have another form, the template fails on it, or it changes earlier turns
            as the conversation grows.
    """
    template = tokenizer.get_chat_template()
    examples, renamed = [], []
    of_tools = batch[tools] if tools else [None] * len(batch[messages])
    for conversation, described in zip(batch[messages], of_tools, strict=True):
        turns = as_messages(conversation)
        roles = {turn["role"]: role_in_template(turn["role"], template) for turn in turns}
        turns = [turn | {"role": roles[turn["role"]]} for turn in turns]
        renamed.append("; ".join(f"{role} -> {name}" for role, name in roles.items() if role != name))
        if not any(turn["role"] == "assistant" for turn in turns):
            examples.append(([], [], f"have no turn of the assistant, only of {', '.join(roles)}"))
            continue
        try:
            ids, mask = render(turns, as_tools(described), tokenizer)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            shown = reprlib.repr(conversation)
            raise UserError(f"the chat template of {tokenizer.name_or_path} fails on {shown}: {error}") from error
        examples.append((ids, [id if trained else IGNORED for id, trained in zip(ids, mask, strict=True)], ""))
    return _truncated(examples, max_length) | {"renamed": renamed}


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _truncated(examples: Iterable[tuple[list[int], list[int], str]], max_length: int | None) -> Batch:
    """Truncate (ids, labels, reason to drop it) to `max_length` tokens, and find examples without a token for the
    loss.
    """
    batch: Batch = {"input_ids": [], "labels": [], "dropped": []}
    for ids, labels, reason in examples:
        # The first token has no tokens before it to be predicted from, so its label is never used
        if not reason and not _has_target(labels[:max_length]):
            reason = NO_TARGET
            if _has_target(labels):
                reason += f" in their first {max_length} tokens (data.max_length)"
        batch["input_ids"].append(ids[:max_length])
        batch["labels"].append(labels[:max_length])
        batch["dropped"].append(reason)
    return batch


def _has_target(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])
