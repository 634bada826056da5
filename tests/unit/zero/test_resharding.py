"""Resharding arithmetic, compared with vectors that are split and assembled explicitly."""

import random

import pytest

from sparse_zero.zero.resharding import Span, even_slice, merge_spans, parameter_offsets, plan_reads


def test_offsets() -> None:
    assert parameter_offsets({"a": 3, "b": 0, "c": 5}) == {"a": 0, "b": 3, "c": 3}


def test_merged_keeps_the_order() -> None:
    assert merge_spans([(0, 2), (2, 5), (7, 8), (5, 7)]) == [(0, 5), (7, 8), (5, 7)]
    assert merge_spans([]) == []


@pytest.mark.parametrize(("total", "ranks"), [(10, 3), (2, 5), (0, 2), (454_280, 8)])
def test_even_slices_cover_the_vector(total: int, ranks: int) -> None:
    slices = [even_slice(total, rank, ranks) for rank in range(ranks)]
    assert merge_spans(slices) == [(0, total)]
    sizes = [end - start for start, end in slices]
    assert max(sizes) - min(sizes) <= 1


def contiguous(total: int, ranks: int, rng: random.Random) -> list[list[Span]]:
    cuts = sorted(rng.randint(0, total) for _ in range(ranks - 1))
    return [[(start, end)] for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def sliced(sizes: list[int], ranks: int) -> list[list[Span]]:
    """As at ZeRO stage 3: a slice of every parameter, the last ones shorter."""
    shards: list[list[Span]] = [[] for _ in range(ranks)]
    start = 0
    for size in sizes:
        piece = -(-size // ranks)
        for rank in range(ranks):
            low, high = min(rank * piece, size), min((rank + 1) * piece, size)
            if low < high:
                shards[rank].append((start + low, start + high))
        start += size
    return shards


@pytest.mark.parametrize("seed", range(20))
def test_reads_assemble_any_partition_from_any_other(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 40) for _ in range(rng.randint(1, 6))]
    total = sum(sizes)
    saved = rng.choice([contiguous(total, 4, rng), sliced(sizes, 4), sliced(sizes, 3)])
    wanted = rng.choice([contiguous(total, 8, rng), sliced(sizes, 3), contiguous(total, 1, rng)])
    files = [[scalar for start, end in spans for scalar in range(start, end)] for spans in saved]
    for spans in wanted:
        expected = [scalar for start, end in spans for scalar in range(start, end)]
        found = [-1] * len(expected)
        for read in plan_reads(spans, saved):
            assert read.count > 0
            found[read.target_offset : read.target_offset + read.count] = files[read.shard][
                read.shard_offset : read.shard_offset + read.count
            ]
        assert found == expected


def test_the_same_partition_is_one_read_from_one_shard() -> None:
    shards = [[(0, 5)], [(5, 9)], [(9, 20)]]
    assert plan_reads([(5, 9)], shards) == [(1, 0, 4, 0)]


@pytest.mark.parametrize("wanted", [(3, 5), (8, 12), (20, 21)])
def test_a_gap_is_an_error(wanted: Span) -> None:
    with pytest.raises(KeyError):
        plan_reads([wanted], [[(0, 4)], [(5, 9)], [(10, 20)]])
