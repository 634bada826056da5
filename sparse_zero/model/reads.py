"""How a thread reads selected weights now: several threads may run the modules of one model."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch


class _Here(threading.local):
    def __init__(self) -> None:
        self.plain: set[Hashable] = set()
        """The weights that are read as plain parameters, in the forward of a SampledModule."""
        self.shared: dict[Hashable, torch.Tensor | None] = {}
        """Those for which all reads return the same tensor, and this tensor after the first read."""


here = _Here()


@contextmanager
def shared(weight: Hashable) -> Iterator[None]:
    """Within this block, which is one forward of a module, all reads return the same tensor. Experts that are read one
    by one then share one gradient of the delta."""
    if weight in here.shared:  # a module inside of another one that has the same, tied weight
        yield
        return
    here.shared[weight] = None
    try:
        yield
    finally:
        del here.shared[weight]


class plain:
    """Within this block reads return the parameter itself, as it is. Not a generator: each layer has such a block."""

    def __init__(self, weight: Hashable) -> None:
        self._weight = weight

    def __enter__(self) -> None:
        self._was_plain = self._weight in here.plain
        here.plain.add(self._weight)

    def __exit__(self, *_: object) -> None:
        if not self._was_plain:
            here.plain.discard(self._weight)
