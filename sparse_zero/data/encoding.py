"""Examples to tokens: pure functions on batches of raw columns, and the packing of several examples into one sequence.

The `encode_*` functions take the batch that Dataset.map gives (a dict: column -> values of all its examples), the
tokenizer, and the names of the columns. Those for language models return `input_ids` and `labels` of equal length,
where the label -100 marks a token that no loss is computed on; they leave out an example that has no other label
behind its first token, so that fewer examples may come out than went in.
"""

import re
import reprlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from sparse_zero.errors import UserError

IGNORED = -100
"""The label of a token that no loss is computed on: the default of torch's cross entropy."""

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
    """The tokenizer's own columns and `labels`, the class ids of the values in `label`."""
    pair = batch[text_pair] if text_pair else None
    encoded = tokenizer(batch[text], pair, truncation=max_length is not None, max_length=max_length)
    return {**encoded, "labels": [ids[value] for value in batch[label]]}


def encode_plain_text(batch: Batch, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None) -> Batch:
    """Every token counts, and an end-of-sequence token is appended."""
    encoded = [_ended(ids, tokenizer) for ids in tokenizer(batch[text], verbose=False).input_ids]
    return _learnable(zip(encoded, encoded, strict=True), max_length)


def encode_completions(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int | None
) -> Batch:
    """The completion and its end-of-sequence token count.

    Prompt and completion are tokenised apart, so that the tokens of the prompt are those that generation starts from.
    """
    prompts = tokenizer(batch[prompt], verbose=False).input_ids
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        prompts = [ids[:-1] for ids in prompts]
    completions = tokenizer(batch[completion], add_special_tokens=False, verbose=False).input_ids
    examples = []
    for start, end in zip(prompts, completions, strict=True):
        end = _ended(end, tokenizer)
        examples.append((start + end, [IGNORED] * len(start) + end))
    return _learnable(examples, max_length)


def encode_conversations(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, messages: str, max_length: int | None
) -> Batch:
    """The assistant's turns count: where the chat template has {% generation %} markers, what they enclose; else
    what each turn adds to the conversation before it and the header that prompts for an answer.

    Raises UserError: a conversation that the template refuses, or rewrites as it grows (then its turns cannot be
    told apart without markers).
    """
    marked = tokenizer.is_fast and re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template())
    mask = _mask_by_markers if marked else _mask_by_prefixes
    examples = []
    for conversation in batch[messages]:
        if not (conversation and all(isinstance(turn, dict) and turn.get("role") for turn in conversation)):
            raise UserError(f"no list of messages, each with a role and a content: {reprlib.repr(conversation)}")
        try:
            ids, counts = mask(conversation, tokenizer)
        except (jinja2.TemplateError, TypeError) as error:
            shown = reprlib.repr(conversation)
            raise UserError(f"the chat template of {tokenizer.name_or_path} refuses {shown}: {error}") from error
        examples.append((ids, [id if count else IGNORED for id, count in zip(ids, counts, strict=True)]))
    return _learnable(examples, max_length)


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
    counts = [0] * len(ids)
    for position, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        before = render(conversation[:position], add_generation_prompt=True) if position else []
        through = render(conversation[: position + 1])
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} rewrites earlier turns, so the assistant's tokens "
                "cannot be found; put {% generation %} and {% endgeneration %} around them in the template"
            )
        counts[len(before) : len(through)] = [1] * (len(through) - len(before))
    return ids, counts


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _learnable(examples: Iterable[tuple[list[int], list[int]]], max_length: int | None) -> Batch:
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in examples]
    # The first token is predicted from nothing, so its label never counts.
    kept = [example for example in cut if any(label != IGNORED for label in example[1][1:])]
    return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Share out examples of the given lengths, none above `max_length`, among sequences of `max_length` tokens.

    Best fit, longest first: each example goes where it leaves the least room. Returns the examples of each sequence,
    in their order.
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        tightest = bisect_left(rooms, lengths[example])
        if tightest == len(rooms):
            room, sequence = max_length, []
            sequences.append(sequence)
        else:
            room = rooms[tightest]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[tightest]
        sequence.append(example)
        room -= lengths[example]
        if not with_room.setdefault(room, []):
            insort(rooms, room)
        with_room[room].append(sequence)
    return sorted(sorted(sequence) for sequence in sequences)


def pack_batch(batch: Batch, max_length: int) -> Batch:
    """Encoded examples joined into sequences of at most `max_length` tokens.

    `position_ids` restart at 0 with each example. The first label of each example is -100: it would be predicted
    from the example before.
    """
    packed: Batch = {"input_ids": [], "labels": [], "position_ids": []}
    for examples in pack([len(ids) for ids in batch["input_ids"]], max_length):
        tokens = [batch["input_ids"][example] for example in examples]
        labels = [[IGNORED, *batch["labels"][example][1:]] for example in examples]
        packed["input_ids"].append(list(chain.from_iterable(tokens)))
        packed["labels"].append(list(chain.from_iterable(labels)))
        packed["position_ids"].append([position for ids in tokens for position in range(len(ids))])
    return packed


@dataclass(frozen=True)
class PackedCollator:
    """Batches of packed sequences: int64 `input_ids`, `labels` and `position_ids`, each [batch, longest].

    There is no attention mask: transformers keeps packed examples apart by where `position_ids` restart, and looks
    there only when it is given neither a mask nor a cache. Padding is at position 0 throughout, so that each of its
    tokens is an example of its own.
    """

    pad_token_id: int

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        return {
            column: pad_sequence(
                [torch.tensor(row[column]) for row in features], batch_first=True, padding_value=value
            )
            for column, value in padding.items()
        }


def check_packing(attn_implementation: str, batch_size: int) -> None:
    """Raise UserError where examples packed in one sequence would attend to each other.

    Flash attention looks for packed examples in a batch of one sequence only (transformers, `_is_packed_sequence`).
    """
    if "flash" in attn_implementation and batch_size > 1:
        raise UserError(
            f"data.packing: {attn_implementation} keeps packed examples apart in batches of one sequence only, not "
            f"{batch_size}; set model.attn_implementation to sdpa, or the batch sizes to 1 and data.max_length higher"
        )
