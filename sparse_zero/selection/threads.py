"""Work on the CPU that is shared out among threads, a piece of a weight or a weight at a time.

Torch's own threads meet after each operation. Where other processes want the cores too, or the pieces are small enough
to stay in a cache, threads that meet once, at the end, are several times faster.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECE = 32_000
"""Scalars that one thread takes at a time: torch shares out operations of more than 32,768."""

_this_thread = threading.local()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The function's result for each item, in order, by as many threads as torch computes with.

    Within such a thread a further call runs alone. Raises what the function raises for the first item that fails, once
    all threads have ended.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or getattr(_this_thread, "is_ours", False):
        return [function(item) for item in items]
    # Both are a thread's own
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode() if inference else torch.set_grad_enabled(gradients):
            return function(item)

    with ThreadPoolExecutor(threads, initializer=_begin) as pool:
        return list(pool.map(run, items))


def _begin() -> None:
    _this_thread.is_ours = True
