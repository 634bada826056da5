"""What a model will see of a recipe's data: rendered examples, lengths, and what is cut, packed and dropped.

    facts = describe_data(recipe)
    facts["train"]["dropped"]   # {"are empty: they have no token": 3}

Only the tokenizer and the configuration of the base model are loaded, no weights.
"""

import copy
import statistics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparse_zero.data.datasets import PreparedData, prepare_data
from sparse_zero.data.models import add_tokens, head_labels, load_config, load_tokenizer, max_positions
from sparse_zero.data.splits import load_splits
from sparse_zero.data.tokenization import IGNORED
from sparse_zero.recipe.objective import refuse_objective
from sparse_zero.recipe.recipe import Recipe

BINS = 12
"""The number of bars of a histogram of lengths."""


def describe_data(recipe: Recipe, examples: int = 2) -> dict[str, Any]:
    """Describe the data of a recipe as the model will see it.

    Args:
        recipe: the recipe.
        examples: the number of training examples to render.

    Returns: `task`, `max_length` (tokens, or None), `labels` (class names of a classifier), for `train` and
        `evaluation` what `_describe_split` returns, and `examples`: for each a list of [text, whether the loss counts
        these tokens]; a classifier's example has its label too.

    Raises UserError: see `load_splits` and `prepare_data`.
    """
    refuse_objective(recipe.training, "data")
    section = recipe.model
    origin = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    tokenizer = load_tokenizer(
        section.tokenizer or section.source, **origin | ({"revision": None} if section.tokenizer else {})
    )
    add_tokens(tokenizer, section.new_tokens)
    config = load_config(section.source, **origin)
    raw = load_splits(recipe.data)
    limit, head = max_positions(config), head_labels(config)
    prepared = prepare_data(recipe.data, section.task, tokenizer, *raw, limit, section.problem_type, head)
    whole = _without_limit(recipe, tokenizer, raw, head)
    names = {"train": "training", "evaluation": "evaluation"}
    return {
        "task": section.task,
        "max_length": prepared.max_length,
        "labels": None if prepared.labels is None else list(prepared.labels.id2label.values()),
        "problem_type": None if prepared.labels is None else prepared.labels.problem_type,
        **{
            key: _describe_split(
                len(given),
                getattr(prepared, key),
                getattr(whole, key),
                prepared.max_length,
                dict(prepared.dropped.get(name, {})),
            )
            for (key, name), given in zip(names.items(), raw, strict=True)
        },
        "examples": _rendered(prepared, tokenizer, examples),
    }


def _without_limit(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, raw: tuple[Dataset, Dataset], head: dict[int, str] | None
) -> PreparedData:
    """The examples in full length and not packed."""
    unlimited = copy.deepcopy(tokenizer)
    unlimited.model_max_length = 10**30
    data = recipe.data.model_copy(update={"max_length": None, "packing": False})
    section = recipe.model
    return prepare_data(data, section.task, unlimited, *raw, None, section.problem_type, head, is_reported=False)


def _describe_split(
    given: int, encoded: Dataset, whole: Dataset, max_length: int | None, dropped: dict[str, int]
) -> dict[str, Any]:
    """Facts about a split.

    Returns:
        `given`: examples in the split; `used`: those that are not dropped; `dropped`: the number for each reason;
        `sequences`: rows that the Trainer gets, which are fewer with packing; `cut`: examples longer than max_length;
        `lost_tokens`: tokens after max_length; `tokens`: minimum, median, mean, 95th percentile and maximum of the
        lengths in full, and their sum; `counted_tokens`: tokens with a loss, of a language model; `histogram`: a list
        of [from, to, examples].
    """
    lengths = _lengths(whole)
    over = [length - max_length for length in lengths if length > max_length] if max_length else []
    facts = {
        "given": given,
        "used": given - sum(dropped.values()),
        "dropped": dropped,
        "sequences": len(encoded),
        "cut": len(over),
        "lost_tokens": sum(over),
        "tokens": {
            "minimum": min(lengths),
            "median": int(statistics.median(lengths)),
            "mean": round(statistics.fmean(lengths), 1),
            "95%": int(np.percentile(lengths, 95)),
            "maximum": max(lengths),
            "sum": sum(lengths),
        },
        "histogram": _histogram(lengths),
    }
    if "attention_mask" not in encoded.column_names:  # a language model's
        flat = _column(encoded, "labels").combine_chunks().flatten()
        facts["counted_tokens"] = len(flat) - (pc.sum(pc.equal(flat, IGNORED)).as_py() or 0)
    return facts


def _lengths(encoded: Dataset) -> list[int]:
    return pc.list_value_length(_column(encoded, "input_ids")).to_pylist()


def _column(encoded: Dataset, name: str) -> pa.ChunkedArray:
    """The values of the rows that are left. `encoded.data` has those that were filtered out as well."""
    return encoded.select_columns([name]).with_format("arrow")[:].column(name)


def _histogram(lengths: list[int]) -> list[list[int]]:
    edges = np.unique(np.linspace(min(lengths), max(lengths) + 1, BINS + 1).round().astype(int))
    counts, edges = np.histogram(lengths, edges)
    return [[int(a), int(b) - 1, int(count)] for a, b, count in zip(edges, edges[1:], counts, strict=False)]


def _rendered(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    rendered = []
    for row in prepared.train.select(range(min(count, len(prepared.train)))):
        if prepared.labels is None:
            rendered.append({"parts": _parts(row["input_ids"], row["labels"], tokenizer)})
        else:
            text = tokenizer.decode(row["input_ids"])
            rendered.append({"parts": [[text, False]], "label": _label(row["labels"], prepared)})
    return rendered


def _label(value: Any, prepared: PreparedData) -> Any:
    names = prepared.labels.id2label
    if prepared.labels.problem_type == "regression":
        return value
    if prepared.labels.problem_type == "multi_label_classification":
        return [names[index] for index, flag in enumerate(value) if flag]
    return names[value]


def _parts(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[list[Any]]:
    """The text in pieces, each with whether the loss counts its tokens. The first token is never predicted."""
    parts: list[list[Any]] = []
    start = 0
    counted = [False, *(label != IGNORED for label in labels[1:])]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or counted[end] != counted[start]:
            parts.append([tokenizer.decode(ids[start:end]), counted[start]])
            start = end
    return parts
