"""Examples for a Trainer: checked, augmented, tokenised, packed and collated.

    train, evaluation = load_splits(recipe.data)
    data = prepare_data(recipe.data, recipe.model.task, tokenizer, train, evaluation, model_limit=512)

Nothing here depends on the rank: all ranks compute the same examples in the same order, or read them from the cache of
`datasets`.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

import rpn.text
from sparse_zero.data import augmentation, packing, tokenization
from sparse_zero.data.cached_maps import map_batches, versioned
from sparse_zero.data.columns import check_columns, required_columns
from sparse_zero.data.dropped import Dropped
from sparse_zero.data.labels import Labels, read_labels
from sparse_zero.data.models import check_max_length
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import Columns, DataSection, ProblemType, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The data for a Trainer."""

    train: Dataset
    evaluation: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    labels: Labels | None
    """The labels of a sequence classifier; None for a language model."""
    max_length: int | None
    """The length in tokens that examples are truncated to, and that packed sequences may have; None for no limit."""
    dropped: Mapping[str, Mapping[str, int]]
    """For the splits "training", "evaluation" and "test": the number of examples that were dropped, by reason."""
    test: Dataset | None = None


def prepare_data(
    data: DataSection,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    evaluation: Dataset,
    model_limit: int | None,
    problem_type: ProblemType | None = None,
    head: Mapping[int, str] | None = None,
    is_reported: bool = True,
    test: Dataset | None = None,
) -> PreparedData:
    """Tokenise the splits into the model's input columns, and choose a collator.

    The loss of a language model is computed on all tokens of plain text, on the completion of a prompt, or on the
    assistant's turns of a conversation. Examples that lack a value, or that have no token for the loss after
    truncation, are dropped with a warning.

    Args:
        data: the recipe's section.
        task: the model's task.
        tokenizer: not changed.
        train: the raw training examples.
        evaluation: the raw evaluation examples.
        model_limit: the maximum sequence length of the model in tokens; None for no limit.
        problem_type, head: see `read_labels`.
        is_reported: whether to log how many examples are dropped.
        test: the raw test examples, if there are any.

    Raises:
        UserError: a column that is missing or has the wrong type, labels that are not classes, a tokenizer without a
            token or chat template that the examples need, or a max_length that the model does not support.
    """
    max_length = _max_length(data, tokenizer, model_limit)
    splits, dropped = {"training": train, "evaluation": evaluation}, Dropped(is_reported)
    splits |= {} if test is None else {"test": test}
    for name, split in splits.items():
        check_columns(split, data.columns, name)
        splits[name] = dropped.incomplete(split, required_columns(data.columns), name)
    if data.augment is not None:
        splits["training"] = _augmented(splits["training"], data)
    tokenizer = _padding_right(tokenizer)
    if task == "sequence-classification":
        labels = read_labels(data.columns.label, splits, problem_type, head)
        encoded = _classification(data.columns, tokenizer, splits, max_length, labels, dropped)
        collator = DataCollatorWithPadding(tokenizer)
        return PreparedData(*encoded[:2], collator, labels, max_length, dropped.counts, *encoded[2:])
    encoded = _language_model(data, tokenizer, splits, max_length, dropped)
    if not data.packing:
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=tokenization.IGNORED)
        return PreparedData(*encoded[:2], collator, None, max_length, dropped.counts, *encoded[2:])
    packed = [map_batches(split, packing.pack_batch, batch_size=10_000, max_length=max_length) for split in encoded]
    collator = packing.PackedCollator(tokenizer.pad_token_id)
    return PreparedData(*packed[:2], collator, None, max_length, dropped.counts, *packed[2:])


def check_augment(data: DataSection) -> None:
    """Raise UserError: there is no WordNet for eda."""
    if data.augment == "eda":
        try:
            rpn.text.wordnet_synonyms("word")
        except rpn.text.SynonymsNotFound as error:
            raise UserError(f"data.augment: {error}") from None


def _augmented(dataset: Dataset, data: DataSection) -> Dataset:
    """The examples, each followed by its changed copies."""
    check_augment(data)
    settings = {"text": data.columns.text, "method": data.augment, "copies": data.augment_copies}
    function = versioned(augmentation.with_copies, settings | {"seed": data.split_seed})
    return dataset.map(function, batched=True, with_indices=True)


def _max_length(data: DataSection, tokenizer: PreTrainedTokenizerBase, model_limit: int | None) -> int | None:
    if data.max_length is not None:
        check_max_length(data.max_length, model_limit)
        added = tokenizer.num_special_tokens_to_add(pair=data.columns.text_pair is not None)
        if data.max_length <= added:
            raise UserError(f"data.max_length: {data.max_length} leaves no room beside {added} special tokens")
        return data.max_length
    # model_max_length is 10^30 if the tokenizer has no limit
    limits = [limit for limit in (model_limit, tokenizer.model_max_length) if limit is not None and limit < 10**9]
    if data.packing and not limits:
        raise UserError("data.max_length is missing: packing needs it because the model's config gives no limit")
    return min(limits, default=None)


def _padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads on the right, so that the positions of an example do not depend on the rest of its batch."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has neither a pad nor an eos token; set model.tokenizer "
                "to one that has"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _classification(
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Dataset],
    max_length: int | None,
    labels: Labels,
    dropped: Dropped,
) -> list[Dataset]:
    encoded = []
    for name, split in splits.items():
        tokens = map_batches(
            split,
            tokenization.encode_for_classification,
            tokenizer=tokenizer,
            text=columns.text,
            text_pair=columns.text_pair,
            label=columns.label,
            labels=labels,
            split=name,
            max_length=max_length,
        )
        encoded.append(dropped.with_reason(tokens, name))
    return encoded


def _language_model(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Dataset],
    max_length: int | None,
    dropped: Dropped,
) -> list[Dataset]:
    columns = data.columns
    if data.example == "messages":
        try:
            tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                f"data.columns.messages: the tokenizer of {tokenizer.name_or_path} has no chat template; set "
                "model.tokenizer to one that has, or use data.columns.prompt and data.columns.completion"
            ) from None
        if dropped.is_reported:
            _report_tools(splits, columns, tokenizer)
        encode, names = tokenization.encode_conversations, {"messages": columns.messages, "tools": columns.tools}
    elif tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos token, which ends each example; set "
            "model.tokenizer to one that has"
        )
    elif data.example == "prompt-completion":
        encode, names = tokenization.encode_completions, {"prompt": columns.prompt, "completion": columns.completion}
    else:
        encode, names = tokenization.encode_plain_text, {"text": columns.text}
    encoded = []
    for name, split in splits.items():
        tokens = map_batches(split, encode, tokenizer=tokenizer, max_length=max_length, **names)
        if "renamed" in tokens.column_names:
            tokens = _without_renamed(tokens, dropped.is_reported)
        encoded.append(dropped.with_reason(tokens, name))
    return encoded


def _report_tools(splits: dict[str, Dataset], columns: Columns, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say if tools are not shown to the model."""
    if columns.tools is None and "tools" in splits["training"].column_names:
        logger.warning("the column 'tools' is not used; set data.columns.tools: tools to show them to the template")
    if columns.tools is not None and "tools" not in tokenizer.get_chat_template(tools=[]):
        logger.warning("data.columns.tools: the chat template of %s does not show tools", tokenizer.name_or_path)


def _without_renamed(encoded: Dataset, is_reported: bool) -> Dataset:
    """Say which roles have other names in chat templates, and remove the column that has them."""
    distinct = pc.unique(encoded.data.column("renamed")).to_pylist()
    roles = {role for roles in distinct for role in roles.split("; ")} - {""}
    if roles and is_reported:
        logger.warning(
            "data.columns.messages: roles are taken for those of chat templates: %s", ", ".join(sorted(roles))
        )
    return encoded.remove_columns("renamed")
