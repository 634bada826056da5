"""The seven tasks on which the RPN paper reports (TweetEval, arXiv 2010.12421): examples and metrics.

The data is a folder of TASK_PART.csv with the columns text and label, as in the RPN authors' repository, part one of
train, val and test. Stance has five targets with a file each: their tweets are put together, each after its target's
name, and train one classifier. Sentiment has no training file there: its validation tweets are divided.
"""

import csv
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score, recall_score

TASKS = ("irony", "emotion", "stance", "offensive", "hate", "sentiment", "emoji")
CLASSES = {"irony": 2, "emotion": 4, "stance": 3, "offensive": 2, "hate": 2, "sentiment": 3, "emoji": 20}
METRICS = {
    "irony": "F1 of the positive class",
    "stance": "mean F1 of favour and against",
    "sentiment": "macro recall",
} | dict.fromkeys(("emotion", "offensive", "hate", "emoji"), "macro F1")
STANCES = ("abortion", "atheism", "climate", "feminist", "hillary")
AGAINST, FAVOUR = 1, 2

SENTIMENT_VALIDATION = 500
"""How many of sentiment's validation tweets are kept for validation."""

Examples = tuple[list[str], list[int]]
"""Texts and labels."""


@cache
def part(directory: Path, task: str, name: str) -> Examples:
    """All examples of a part: train, validation or test.

    Raises FileNotFoundError: the folder lacks a file.
    """
    files = {"train": "train", "validation": "val", "test": "test"}
    if task == "stance":
        parts = [(f"{target}: ", _read(directory / f"stance_{target}_{files[name]}.csv")) for target in STANCES]
        return (
            [prefix + text for prefix, (texts, _) in parts for text in texts],
            [label for _, (_, labels) in parts for label in labels],
        )
    if task == "sentiment" and name != "test":
        texts, labels = _read(directory / "sentiment_val.csv")
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        order = order[:SENTIMENT_VALIDATION] if name == "validation" else order[SENTIMENT_VALIDATION:]
        return [texts[index] for index in order], [labels[index] for index in order]
    return _read(directory / f"{task}_{files[name]}.csv")


def _read(file: Path) -> Examples:
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    return [row["text"] for row in rows], [int(row["label"]) for row in rows]


def drawn(examples: Examples, count: int, seed: int) -> Examples:
    """At most `count` of the examples, drawn with a seed."""
    texts, labels = examples
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [texts[index] for index in order], [labels[index] for index in order]


def score(task: str, labels: list[int], predicted: list[int]) -> float:
    """The task's own metric."""
    if task == "irony":
        return float(f1_score(labels, predicted, zero_division=0))
    if task == "sentiment":
        return float(recall_score(labels, predicted, average="macro", zero_division=0))
    counted = [AGAINST, FAVOUR] if task == "stance" else None
    return float(f1_score(labels, predicted, average="macro", labels=counted, zero_division=0))


def accuracies(labels: list[int], predicted: list[int], batch: int = 128) -> tuple[float, float]:
    """The accuracy of all, and as RPN's public code computes it: the mean over whole batches in the file's order, so
    that what fills no batch is left out. The second is NaN for less than a batch.
    """
    right = np.equal(labels, predicted)
    whole = len(right) // batch * batch
    return float(right.mean()), float(right[:whole].mean()) if whole else float("nan")
