"""A parallel map over threads, for CPU work on many weights.

torch's own threads synchronize after each operation. If other processes use the cores as well, or if chunks fit into
the cache, threads that synchronize only once, at the end, are several times faster.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_this_thread = threading.local()


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function to each item, in `torch.get_num_threads()` threads.

    A nested call, from one of these threads, starts no further threads.

    Returns:
        The results in the order of the items.

    Raises:
        Exception: the exception of the first item that fails, after all threads have ended.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or getattr(_this_thread, "is_worker", False):
        return [function(item) for item in items]
    # Both modes are local to a thread
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode() if inference else torch.set_grad_enabled(gradients):
            return function(item)

    with ThreadPoolExecutor(threads, initializer=_mark_worker) as pool:
        return list(pool.map(run, items))


def _mark_worker() -> None:
    _this_thread.is_worker = True
