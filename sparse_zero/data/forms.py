"""Recognises the form of a data set by its columns: conversations, preferences, prompts, labelled and plain texts.

form = recognise(dataset)
form.task, form.columns    # "causal-lm", {"messages": "conversations"}
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from datasets import ClassLabel, Dataset, LargeList, List, Value

from sparse_zero.errors import UserError
from sparse_zero.recipe.objective import TASKS
from sparse_zero.recipe.recipe import Task

CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns")
PROMPTS = ("prompt", "question", "instruction", "query", "input", "source", "problem", "context")
COMPLETIONS = ("completion", "response", "answer", "output", "target", "solution", "summary", "reply")
LABELS = (
    *("label", "labels", "class", "category", "sentiment", "intent", "emotion", "topic", "score", "stars", "rating"),
    *("target", "toxicity", "similarity", "is_duplicate", "entailment"),
)
TEXTS = ("text", "sentence", "review", "content", "tweet", "comment", "document", "body", "title", "utterance")
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text_a", "text_b")),
    *(("text1", "text2"), ("question", "sentence"), ("query", "passage")),
)
MAX_CLASSES = 200
"""A column with more distinct words is no label."""


@dataclass(frozen=True)
class Form:
    """What a data set is for."""

    name: str
    """In words, for people."""
    task: Task
    columns: dict[str, str | list[str]]
    """The `data.columns` of a recipe."""
    notes: tuple[str, ...] = ()
    """What the user should know."""
    objective: str | None = None
    """The `training.objective` of a recipe."""


def recognise(dataset: Dataset, objective: str | None = None) -> Form:
    """Recognise the form of a data set by the names and types of its columns. Names may differ in case.

    Args:
        dataset: the data set.
        objective: what preferences are for: "dpo" or "reward". None: dpo.

    Raises UserError: its columns have no form that is known, or none for the objective.
    """
    columns = {name.lower(): name for name in dataset.column_names}
    if objective is not None:
        if form := _preference(dataset, columns, objective):
            return form
        raise UserError(
            f"the columns {', '.join(dataset.column_names)} are no preferences: {objective} needs `chosen` and "
            "`rejected`"
        )
    for find in (_conversation, _preference, _instruction, _pair, _labelled, _prompt, _plain):
        if form := find(dataset, columns):
            return form
    raise UserError(
        f"the columns {', '.join(dataset.column_names)} have no form that is known; write a recipe and name them in "
        "data.columns (`sparse-zero keys data.columns`)"
    )


def _conversation(dataset: Dataset, columns: dict[str, str]) -> Form | None:
    name = _first(columns, CONVERSATIONS)
    if name is None or not _has_messages(dataset, name):
        return None
    shape = "ShareGPT conversations" if "from" in _keys(dataset, name) else "conversations"
    tools = {"tools": columns["tools"]} if "tools" in columns else {}
    return Form(shape, "causal-lm", {"messages": name, **tools})


def _preference(dataset: Dataset, columns: dict[str, str], objective: str = "dpo") -> Form | None:
    if not {"chosen", "rejected"} <= columns.keys():
        return None
    names: dict[str, str | list[str]] = {"chosen": columns["chosen"], "rejected": columns["rejected"]}
    is_chat, prompt = _has_messages(dataset, columns["chosen"]), _first(columns, PROMPTS)
    # A text beside conversations repeats their first turn
    if prompt and (_has_messages(dataset, prompt) if is_chat else _is_text(dataset, prompt)):
        names = {"prompt": prompt, **names}
        name = "preferences between answers"
    else:
        name = f"preferences between {'conversations' if is_chat else 'texts'}"
    note = () if objective == "reward" else ("--objective reward writes a recipe for a reward model",)
    return Form(name, cast(Task, TASKS[objective]), names, note, objective)


def _instruction(dataset: Dataset, columns: dict[str, str]) -> Form | None:
    completion = _first(columns, ("output", "response"))
    if not ({"instruction", "input"} <= columns.keys() and completion and _is_text(dataset, columns["instruction"])):
        return None
    prompt = [columns["instruction"], columns["input"]]
    return Form("instructions with inputs (Alpaca)", "causal-lm", {"prompt": prompt, "completion": completion})


def _pair(dataset: Dataset, columns: dict[str, str]) -> Form | None:
    label = _label(dataset, columns)
    for first, second in PAIRS:
        if label and first in columns and second in columns:
            names = {"text": columns[first], "text_pair": columns[second], "label": label}
            return Form(f"pairs of texts with {_kind(dataset, label)}", "sequence-classification", names)
    return None


def _labelled(dataset: Dataset, columns: dict[str, str]) -> Form | None:
    label = _label(dataset, columns)
    text = _first(columns, TEXTS) or _only_text(dataset, label)
    if label is None or text is None or text == label:
        return None
    names: dict[str, str | list[str]] = {"text": text, "label": label}
    return Form(f"texts with {_kind(dataset, label)}", "sequence-classification", names)


def _prompt(dataset: Dataset, columns: dict[str, str]) -> Form | None:
    prompt = _first(columns, PROMPTS)
    completion = _first({key: name for key, name in columns.items() if name != prompt}, COMPLETIONS)
    if prompt and completion and _is_text(dataset, prompt) and _is_text(dataset, completion):
        return Form("prompts with completions", "causal-lm", {"prompt": prompt, "completion": completion})
    return None


def _plain(dataset: Dataset, columns: dict[str, str]) -> Form | None:
    text = _first(columns, TEXTS) or _only_text(dataset, None)
    return Form("plain text", "causal-lm", {"text": text}) if text and _is_text(dataset, text) else None


def _first(columns: dict[str, str], names: Iterable[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _label(dataset: Dataset, columns: dict[str, str]) -> str | None:
    return next((columns[n] for n in LABELS if n in columns and _may_be_label(dataset, columns[n])), None)


def _may_be_label(dataset: Dataset, name: str) -> bool:
    feature = dataset.features[name]
    inner = feature.feature if isinstance(feature, List | LargeList) else feature
    if isinstance(inner, ClassLabel):
        return True
    if not isinstance(inner, Value):
        return False
    if inner.dtype in ("string", "large_string") and inner is feature:
        distinct = len(dataset.unique(name))
        return distinct <= min(MAX_CLASSES, max(2, len(dataset) // 2))
    return inner.dtype.startswith(("int", "uint", "bool", "string")) or (inner is feature and "float" in inner.dtype)


def _kind(dataset: Dataset, label: str) -> str:
    feature = dataset.features[label]
    if isinstance(feature, List | LargeList):
        return "several classes each"
    is_float = isinstance(feature, Value) and feature.dtype.startswith("float")
    if is_float and any(value is not None and not value.is_integer() for value in dataset.unique(label)):
        return "numbers (regression)"
    return "classes"


def _is_text(dataset: Dataset, name: str) -> bool:
    feature = dataset.features[name]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _only_text(dataset: Dataset, label: str | None) -> str | None:
    texts = [name for name in dataset.column_names if name != label and _is_text(dataset, name)]
    return texts[0] if len(texts) == 1 else None


def _keys(dataset: Dataset, name: str) -> set[str]:
    """The keys of the first conversation's turns."""
    first: Any = next((row for row in dataset.select(range(min(20, len(dataset))))[name] if row), None)
    turns = first if isinstance(first, list) else []
    return {key for turn in turns if isinstance(turn, dict) for key in turn}


def _has_messages(dataset: Dataset, name: str) -> bool:
    keys = _keys(dataset, name)
    return "role" in keys or "from" in keys
