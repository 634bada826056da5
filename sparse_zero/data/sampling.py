"""The order of the training examples as a function of (seed, epoch): what a resumed run can meet again."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Examples of like length together, in an order that is a function of (seed, epoch, examples of a step).

    The Trainer's own is shuffled by whatever state torch's generator is in, which no resumed run meets again, and by
    groups that depend on the number of ranks.
    """

    def __init__(self, examples_per_step: int, lengths: list[int], seed: int) -> None:
        super().__init__(examples_per_step, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch)
        return super().__iter__()


def set_epoch(loader: Any, epoch: int) -> None:
    """Also through the wrapper in which Accelerate skips batches, where its own set_epoch gets lost."""
    while loader is not None:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        loader = getattr(loader, "batch_sampler", None) or getattr(loader, "sampler", None)
