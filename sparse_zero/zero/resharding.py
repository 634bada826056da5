"""Who holds which scalars: pure functions over spans of the trained vector, which know nothing of files or ranks.

All trained parameters, one after the other in a checkpoint's own order, make one vector. A span (start, end) is a
half-open stretch of it. A shard holds the scalars of its spans, one span after the other.
"""

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Span = tuple[int, int]


class Read(NamedTuple):
    """A copy of `count` scalars from a shard into what a rank wants."""

    shard: int
    at: int
    """Where they begin among the shard's scalars."""
    count: int
    into: int
    """Where they begin among the wanted scalars."""


def offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """Where each parameter begins in the vector. Args: sizes: scalars by name, in the vector's order."""
    return dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same scalars in the same order, with spans that continue each other joined."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def even_share(total: int, rank: int, ranks: int) -> Span:
    """What `rank` writes of a vector that every rank holds whole: shares differ by one scalar at most."""
    return total * rank // ranks, total * (rank + 1) // ranks


def plan_reads(wanted: Sequence[Span], shards: Sequence[Sequence[Span]]) -> list[Read]:
    """How to assemble the scalars of `wanted`, one span after the other, from what each shard holds.

    Raises KeyError with the first span that no shard holds.
    """
    held = []
    for number, spans in enumerate(shards):
        at = 0
        for start, end in spans:
            if end > start:
                held.append((start, end, number, at))
            at += end - start
    held.sort()
    starts = [start for start, *_ in held]
    reads, into = [], 0
    for start, end in wanted:
        while start < end:
            index = bisect.bisect_right(starts, start) - 1
            if index < 0 or held[index][1] <= start:
                raise KeyError((start, end))
            first, last, number, at = held[index]
            count = min(end, last) - start
            reads.append(Read(number, at + start - first, count, into))
            start, into = start + count, into + count
    return reads


def share_batch(total: int, ranks: int, at_most: int) -> tuple[int, int] | None:
    """How `ranks` share a step of `total` examples: (examples of a micro-batch on a rank, micro-batches).

    The largest micro-batch of `at_most` examples or fewer, so that memory is never more than asked for; None where
    the examples cannot be shared evenly.
    """
    if total % ranks:
        return None
    of_rank = total // ranks
    size = max(size for size in range(1, min(at_most, of_rank) + 1) if of_rank % size == 0)
    return size, of_rank // size
