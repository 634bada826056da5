"""What torch's allocators hand out: every byte at every moment, temporaries within operators included."""

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
    """A stretch of a `Meter`'s time."""

    live: list[int]
    """Bytes in use: before it, and after each allocation and each release within."""

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
        """What was in use for a moment, beyond what was there before and what remains."""
        return self.peak - max(self.first, self.last)


class Meter:
    """Counts what this thread allocates of one kind of memory while it is entered. What was there before does not
    count; its release would, where an earlier Meter has seen it come, so it has to stay.

    The events are the profiler's own, of the allocator: exact, where a peak of resident memory has pages that nobody
    uses any more, and pages that nobody has touched yet.
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
        """Give what happens in this block a name for `spans`."""
        return record_function(name)

    @property
    def whole(self) -> Span:
        return Span(self._live)

    def spans(self, name: str) -> list[Span]:
        """Of blocks that were marked, of operators, and of autograd's nodes (`MmBackward0`), in their order."""
        return [
            Span(self._live[bisect.bisect_left(self._times, start) : bisect.bisect_right(self._times, stop) + 1])
            for start, stop in self._spans.get(name, [])
        ]


def peak_of(action: Callable[[], object]) -> tuple[float, int]:
    """Returns: seconds, and by how much the process grew at its largest, in bytes. Linux."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = resident("VmRSS")
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    return seconds, max(0, resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> int:
    """Args: field: of /proc/self/status: VmRSS now, VmHWM at its largest. Returns: bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
