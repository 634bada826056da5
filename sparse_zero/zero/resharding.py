"""Resharding arithmetic: which shard stores which scalars. Pure functions, without files and processes.

The trained parameters, flattened and concatenated in the checkpoint's order, form one vector. A span (start, end) is a
half-open range of this vector. A shard stores the scalars of its spans, one span after the other.
"""

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Span = tuple[int, int]


class Read(NamedTuple):
    """A copy of `count` scalars from a shard to the scalars that a rank needs."""

    shard: int
    shard_offset: int
    """Offset of the first one among the shard's scalars."""
    count: int
    target_offset: int
    """Offset of the first one among the needed scalars."""


def parameter_offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """The offset of each parameter in the vector.

    Args:
        sizes: number of scalars by parameter name, in the order of the vector.
    """
    return dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Join each span that begins where the one before it ends. The scalars and their order stay the same."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def even_slice(total: int, rank: int, world_size: int) -> Span:
    """The slice that `rank` saves of a vector that every rank has. The slices' sizes differ by at most one scalar."""
    return total * rank // world_size, total * (rank + 1) // world_size


def plan_reads(wanted: Sequence[Span], shards: Sequence[Sequence[Span]]) -> list[Read]:
    """Plan the copies that assemble the scalars of `wanted` from the shards.

    Args:
        wanted: the spans that a rank needs; their scalars are assembled one span after the other.
        shards: the spans that each shard stores.

    Raises:
        KeyError: no shard stores the start of this span (start, end).
    """
    stored = []
    for shard, spans in enumerate(shards):
        offset = 0
        for start, end in spans:
            if end > start:
                stored.append((start, end, shard, offset))
            offset += end - start
    stored.sort()
    starts = [start for start, *_ in stored]
    reads, target_offset = [], 0
    for start, end in wanted:
        while start < end:
            index = bisect.bisect_right(starts, start) - 1
            if index < 0 or stored[index][1] <= start:
                raise KeyError((start, end))
            first, last, shard, offset = stored[index]
            count = min(end, last) - start
            reads.append(Read(shard, offset + start - first, count, target_offset))
            start, target_offset = start + count, target_offset + count
    return reads
