"""CoLA (arXiv 1805.12471): sentences that are acceptable English or not.

The data is a folder with in_domain_train.tsv, in_domain_dev.tsv and out_of_domain_dev.tsv, as published: source,
label, the author's mark, sentence. Validation sentences are drawn from the training file; the test sentences are those
of both development files, whose labels are public.
"""

import csv
from functools import cache
from pathlib import Path

import torch
from noise_quality import Sentences
from noise_quality_plan import Run
from transformers import AutoTokenizer

from sparse_zero import UserError
from sparse_zero.data.package import package_path

TRAINING, TEST = ("in_domain_train.tsv",), ("in_domain_dev.tsv", "out_of_domain_dev.tsv")


@cache
def examples(directory: Path, names: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Sentences and labels of the files, without a header.

    Raises UserError: the folder lacks a file.
    """
    texts, labels = [], []
    for name in names:
        try:
            with open(directory / name, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row[1] in "01"]
        except OSError as error:
            raise UserError(f"{directory / name}: {error.strerror}; --data is the folder of CoLA's files") from None
        texts += [row[3] for row in rows]
        labels += [int(row[1]) for row in rows]
    return texts, labels


@cache
def _encoded(directory: Path, base_model: str, max_length: int) -> tuple[list[list[int]], list[int], int]:
    """Token ids and labels of training and test sentences, and how many of them are for training."""
    (training, labels), (test, of_test) = examples(directory, TRAINING), examples(directory, TEST)
    tokenizer = AutoTokenizer.from_pretrained(package_path(base_model))
    ids = tokenizer([*training, *test], truncation=True, max_length=max_length).input_ids
    return ids, [*labels, *of_test], len(training)


def sentences(run: Run, directory: Path) -> Sentences:
    """What a run trains on, drawn with its seed, and its validation or test sentences.

    Raises UserError: the training file has too few sentences.
    """
    ids, labels, count = _encoded(directory, run.base_model, run.max_length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    validation, pool = order[: run.held_out], order[run.held_out :]
    if run.size > len(pool):
        raise UserError(f"{run.size:,} training sentences: CoLA has {len(pool):,}; lower --size")
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(run.seed))[: run.size].tolist()
    held_out = validation if run.split == "validation" else [*range(count, len(ids))]
    return Sentences(ids, labels, [pool[index] for index in drawn], held_out)
