"""Measures the memory that torch's allocators allocate, including temporaries within operators."""

import bisect
import ctypes
import gc
import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Span:
    """An interval of a `Meter`'s time."""

    live: list[int]
    """Bytes in use: before the interval, and after each allocation and each release within it."""

    @property
    def first(self) -> int:
        return self.live[0]

    @property
    def last(self) -> int:
        return self.live[-1]

    @property
    def peak(self) -> int:
        return max(self.live)

    @property
    def transient(self) -> int:
        """The temporary bytes at the peak: beyond what was in use before, and beyond what remains."""
        return self.peak - max(self.first, self.last)


class Meter:
    """Counts the allocations of this thread on one kind of device while its context is active. Memory that was
    allocated before does not count. It must not be released in the context: its release would count if an earlier
    Meter has seen its allocation.

    The meter uses the profiler's events of the allocator, which are exact. (Resident memory also contains pages that
    are no longer used, and lacks pages that have not been touched yet.)
    """

    def __init__(self, device: str = "cpu") -> None:
        self._kind = torch.device(device).type.upper()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._times: list[int] = []
        self._live: list[int] = [0]
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> "Meter":
        gc.collect()
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [e for e in events if e.name() == "[memory]" and e.device_type().name == self._kind]
        self._times = [event.start_ns() for event in changes]
        self._live = [0, *itertools.accumulate(event.nbytes() for event in changes)]
        for event in events:
            self._spans.setdefault(event.name(), []).append((event.start_ns(), event.start_ns() + event.duration_ns()))

    @staticmethod
    def mark(name: str) -> AbstractContextManager:
        """Name the operations in this block, for `spans`."""
        return record_function(name)

    @property
    def whole(self) -> Span:
        return Span(self._live)

    def spans(self, name: str) -> list[Span]:
        """The intervals of a marked block, an operator or an autograd node (`MmBackward0`), in their order."""
        return [
            Span(self._live[bisect.bisect_left(self._times, start) : bisect.bisect_right(self._times, stop) + 1])
            for start, stop in self._spans.get(name, [])
        ]


def peak_of(action: Callable[[], object]) -> tuple[float, int]:
    """Returns: seconds, and the growth of the process's resident memory at its peak, in bytes. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before must not be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
    before = resident("VmRSS")
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    return seconds, max(0, resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> int:
    """Resident memory in bytes. Args: field: of /proc/self/status: VmRSS (current) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of some tensors. Each storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
