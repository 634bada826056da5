"""Samplers whose order of the training examples depends on (seed, epoch) only, so that a resumed run reproduces it."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Groups examples of similar length. The order is a function of (seed, epoch, examples per step).

    The order of transformers' sampler depends on the state of torch's generator, which a resumed run cannot reproduce,
    and on the number of ranks.
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
    """Set the epoch of a data loader's samplers, also inside Accelerate's wrapper that skips batches.

    That wrapper does not pass `set_epoch` on.
    """
    while loader is not None:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        loader = getattr(loader, "batch_sampler", None) or getattr(loader, "sampler", None)
