"""The `data` section of a recipe: load, filter, split, tokenise, pack and collate examples.

    train, evaluation = load_splits(recipe.data)
    data = prepare_data(recipe.data, recipe.model.task, tokenizer, train, evaluation, model_limit=512)

Nothing here depends on the rank: all ranks compute the same examples in the same order, or read them from the cache of
`datasets`.
"""

import copy
import hashlib
import logging
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import tokenizers
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetBuilder, Value
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

import rpn.text
from sparse_zero.data import augmentation, conversations, packing, tokenization
from sparse_zero.data import labels as label_kinds
from sparse_zero.data.dropped import Dropped
from sparse_zero.data.files import message_of, open_builder
from sparse_zero.data.labels import Labels, read_labels
from sparse_zero.data.models import check_max_length
from sparse_zero.errors import UserError, did_you_mean
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


def load_splits(data: DataSection) -> tuple[Dataset, Dataset]:
    """The training and the evaluation examples of `load_parts`."""
    train, evaluation, _ = load_parts(data)
    return train, evaluation


def load_parts(data: DataSection) -> tuple[Dataset, Dataset, Dataset | None]:
    """Load the raw examples, filtered and limited to the sizes that the recipe sets.

    Without `data.eval_split`, evaluation examples are held out from the training split and not used for training.
    Without `data.test_split`, test examples are taken out of the evaluation examples. A split may be a slice
    ("train[:80%]"). Subsets are drawn at random with `data.split_seed`.

    Returns: the training, evaluation and test examples; no test examples if the recipe asks for none.

    Raises:
        UserError: a missing file, an unknown split or filter column, a split that is empty or too small, or data that
            `datasets` cannot read.
    """
    builder = open_builder(data)
    train = _read(builder, data, "train_split")
    if data.eval_split is None:
        train, evaluation = _hold_out(train, data)
    else:
        train, evaluation = _subset(train, data, "train"), _subset(_read(builder, data, "eval_split"), data, "eval")
    if data.test_split is not None:
        return train, evaluation, _subset(_read(builder, data, "test_split"), data, "test")
    if data.test_size is None:
        return train, evaluation, None
    count = _count(data.test_size, len(evaluation), "test")
    if count == len(evaluation):
        raise UserError(
            f"data.test_size: {data.test_size} takes all {count} evaluation examples: reduce it, raise "
            "data.eval_size, or set data.test_split"
        )
    parts = evaluation.train_test_split(test_size=count, seed=data.split_seed)
    return train, parts["train"], parts["test"]


def _read(builder: DatasetBuilder, data: DataSection, key: str) -> Dataset:
    split = getattr(data, key)
    known = list(builder.info.splits)
    if re.split(r"[\[+]", split)[0] not in known:
        near = did_you_mean(split, known)
        raise UserError(f"data.{key}: '{data.path}' has no split '{split}'{near}; its splits: {', '.join(known)}")
    try:
        dataset = builder.as_dataset(split)
    except ValueError as error:
        raise UserError(f"data.{key}: split '{split}' of '{data.path}': {message_of(error)}") from error
    if not data.filter:
        return dataset
    for column in data.filter:
        _require_column(dataset, column, f"data.filter: split '{split}'")
        if not isinstance(dataset.features[column], Value | ClassLabel):
            raise UserError(
                f"data.filter: column '{column}' has the type {_type_name(dataset.features[column])}; filters need "
                "single values"
            )
    wanted = [value if isinstance(value, list) else [value] for value in data.filter.values()]
    kept = _filter(dataset, _matches, list(data.filter), wanted=wanted)
    if len(kept) == 0:
        seen = "; ".join(f"{column} has {reprlib.repr(dataset.unique(column))}" for column in data.filter)
        raise UserError(f"data.filter: {data.filter} matches none of the {len(dataset)} examples of '{split}'; {seen}")
    return kept


def _matches(*columns: list, wanted: list[list]) -> list[bool]:
    tests = [[value in values for value in column] for column, values in zip(columns, wanted, strict=True)]
    return [all(row) for row in zip(*tests, strict=True)]


def _hold_out(dataset: Dataset, data: DataSection) -> tuple[Dataset, Dataset]:
    total = len(dataset)
    held_out = _count(data.eval_size, total, "eval") if data.eval_size is not None else max(total // 10, 1)
    rest = _count(data.train_size, total, "train") if data.train_size is not None else total - held_out
    if rest < 1 or rest + held_out > total:
        raise UserError(
            f"data.train_split '{data.train_split}': {max(rest, 1)} training and {held_out} held-out evaluation "
            f"examples are more than its {total}; reduce data.train_size or data.eval_size, or set data.eval_split"
        )
    splits = dataset.train_test_split(test_size=held_out, train_size=rest, seed=data.split_seed)
    return splits["train"], splits["test"]


def _subset(dataset: Dataset, data: DataSection, role: str) -> Dataset:
    size = getattr(data, f"{role}_size")
    if size is None:
        return dataset
    return dataset.shuffle(seed=data.split_seed).select(range(_count(size, len(dataset), role)))


def _count(size: int | float, available: int, role: str) -> int:
    count = int(size * available) if isinstance(size, float) and size <= 1 else int(size)
    if size > 1 and count != size:
        raise UserError(f"data.{role}_size: {size} is neither a number of examples nor a fraction of at most 1")
    if not 1 <= count <= available:
        raise UserError(
            f"data.{role}_size: {size} means {count} examples; the split has {available} (after data.filter)"
        )
    return count


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
        splits[name] = dropped.incomplete(split, _required(data.columns), name, _filter)
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
    packed = [_map(split, packing.pack_batch, batch_size=10_000, max_length=max_length) for split in encoded]
    collator = packing.PackedCollator(tokenizer.pad_token_id)
    return PreparedData(*packed[:2], collator, None, max_length, dropped.counts, *packed[2:])


def _augmented(dataset: Dataset, data: DataSection) -> Dataset:
    """The examples, each followed by its changed copies. Raises UserError: there is no WordNet for eda."""
    if data.augment == "eda":
        try:
            rpn.text.wordnet_synonyms("word")
        except rpn.text.SynonymsNotFound as error:
            raise UserError(f"data.augment: {error}") from None
    settings = {"text": data.columns.text, "method": data.augment, "copies": data.augment_copies}
    function = _versioned(augmentation.with_copies, settings | {"seed": data.split_seed})
    return dataset.map(function, batched=True, with_indices=True)


def _required(columns: Columns) -> list[str]:
    """The columns that must have a value. A conversation may have no tools, and an instruction no input."""
    used = columns.model_dump(exclude_none=True, exclude={"tools"})
    return [column if isinstance(column, str) else column[0] for column in used.values()]


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


def without_incomplete(dataset: Dataset, columns: Columns, name: str) -> Dataset:
    """Leave out the examples that lack a value. Raises UserError: none is left. Args: name: of the split."""
    return Dropped().incomplete(dataset, _required(columns), name, _filter)


def check_columns(dataset: Dataset, columns: Columns, name: str) -> None:
    """Raise UserError if a split has no column of this name, or one of another type. Args: name: of the split."""
    named = [
        (role, column)
        for role, given in columns.model_dump(exclude_none=True).items()
        for column in ([given] if isinstance(given, str) else given)
    ]
    for role, column in named:
        where = f"data.columns.{role}: the {name} data"
        _require_column(dataset, column, where)
        feature = dataset.features[column]
        dtype = getattr(feature, "dtype", None)
        if role in ("text", "text_pair", "prompt", "completion") and dtype not in ("string", "large_string"):
            raise UserError(f"{where} has the type {_type_name(feature)} in column '{column}', not text")
        if role in ("chosen", "rejected") and isinstance(feature, Value) and dtype not in ("string", "large_string"):
            raise UserError(
                f"{where} has the type {_type_name(feature)} in column '{column}', neither text nor lists of messages"
            )
        if role == "messages" and isinstance(feature, Value | ClassLabel):
            raise UserError(f"{where} has the type {_type_name(feature)} in column '{column}', not lists of messages")


def _require_column(dataset: Dataset, column: str, where: str) -> None:
    if column not in dataset.column_names:
        near = did_you_mean(column, dataset.column_names)
        raise UserError(f"{where} has no column '{column}'{near}; its columns: {', '.join(dataset.column_names)}")


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


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
        tokens = _map(
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
        encoded.append(dropped.with_reason(tokens, name, _filter))
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
        tokens = _map(split, encode, tokenizer=tokenizer, max_length=max_length, **names)
        if "renamed" in tokens.column_names:
            tokens = _without_renamed(tokens, dropped.is_reported)
        encoded.append(dropped.with_reason(tokens, name, _filter))
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


def _map(
    dataset: Dataset, function: Callable[..., dict[str, list]], batch_size: int = 1000, **arguments: Any
) -> Dataset:
    """Replace all columns by those that `function` returns for batches."""
    return dataset.map(
        _versioned(function, arguments), batched=True, batch_size=batch_size, remove_columns=dataset.column_names
    )


def _filter(dataset: Dataset, function: Callable[..., list[bool]], columns: list[str], **arguments: Any) -> Dataset:
    """The rows for which `function`, called with a list of values per column, returns True."""
    return dataset.filter(_versioned(function, arguments), input_columns=columns, batched=True)


def _versioned(function: Callable, arguments: dict[str, Any]) -> Callable:
    """`function` with its arguments, such that the cache of `datasets` is not used after the code has changed."""
    return partial(_apply, function, _version(), arguments)


def _apply(function: Callable, _: str, arguments: dict[str, Any], *batch: Any) -> Any:
    return function(*batch, **arguments)


@cache
def _version() -> str:
    """A hash of this code and the tokenizer libraries. `datasets` identifies imported functions only by name."""
    modules = (augmentation, conversations, label_kinds, packing, tokenization, rpn.text)
    sources = b"".join(Path(file).read_bytes() for file in (__file__, *(module.__file__ for module in modules)))
    releases = f"{transformers.__version__} {tokenizers.__version__}".encode()
    return hashlib.sha256(sources + releases).hexdigest()
