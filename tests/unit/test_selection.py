import hashlib
import math
import re

import pytest
import torch

from sparse_zero.budget import by_density as budget
from sparse_zero.errors import UserError
from sparse_zero.selection import STRATIFIED, checksum, positions

V_PROJ = "model.layers.0.self_attn.v_proj.weight"


def reference(seed: int, name: str, numel: int, count: int) -> list[int]:
    """stratified-v1 in Python's unbounded integers."""
    digest = hashlib.sha256(f"stratified-v1/{seed}/{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    found = []
    for i in range(count):
        x = (key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x ^= x >> 31
        start, stop = i * numel // count, (i + 1) * numel // count
        found.append(start + (x >> 1) % (stop - start))
    return found


def sha256(drawn: torch.Tensor) -> str:
    return hashlib.sha256(drawn.numpy().astype("<i8").tobytes()).hexdigest()[:16]


# Positions are never stored: adapters of every earlier version count on these numbers. A new rule gets a new name.
@pytest.mark.parametrize(
    ("seed", "name", "numel", "count", "expected", "first"),
    [
        (0, V_PROJ, 4096 * 4096, 167772, "b2cd6d77ea294b19", [88, 129, 251, 381]),
        (1, V_PROJ, 4096 * 4096, 167772, "3dc944fb7d2aa341", [68, 135, 218, 330]),
        (0, "transformer.h.11.attn.c_proj.weight", 768 * 768, 5898, "65851d5800fae180", [43, 144, 222, 378]),
        (3, "encoder.layer.5.output.dense.weight", 384 * 1536, 1, "2f56ffea39adb94f", [11790]),
        (7, "w", 10, 3, "fd5a52c034578ddb", [0, 3, 9]),
        (7, "w", 10, 10, "23c379d6c0f22ef6", [0, 1, 2, 3]),
        (0, "", 1, 1, "af5570f5a1810b7a", [0]),
        (2**63 - 1, "классификатор.weight", 2**40, 1000, "eef97b9d8b859933", [873359118, 1372812185, 2624813432]),
    ],
)
def test_golden_positions(seed, name, numel, count, expected, first):
    drawn = positions(seed, name, numel, count)
    assert STRATIFIED == "stratified-v1"
    assert drawn[: len(first)].tolist() == first
    assert sha256(drawn) == expected


@pytest.mark.parametrize(("numel", "count"), [(1, 1), (7, 7), (1000, 999), (1000, 501), (4096, 41), (2**61, 300)])
def test_agrees_with_unbounded_integers(numel, count):
    assert positions(5, V_PROJ, numel, count).tolist() == reference(5, V_PROJ, numel, count)


@pytest.mark.parametrize(("numel", "count"), [(1, 1), (100, 100), (101, 100), (199, 100), (12345, 1234)])
def test_one_position_in_each_block(numel, count):
    drawn = positions(0, "w", numel, count).tolist()
    assert len(drawn) == count
    for i, position in enumerate(drawn):
        assert i * numel // count <= position < (i + 1) * numel // count


@pytest.mark.parametrize("numel", [2**40, 2**62 - 1])
def test_huge_weights_do_not_overflow(numel):
    count = 2**31 - 1
    start = count - 1000
    drawn = positions(0, "experts", numel, count, start)
    lower = torch.tensor([i * numel // count for i in range(start, count)])
    upper = torch.tensor([(i + 1) * numel // count for i in range(start, count)])
    assert torch.all((lower <= drawn) & (drawn < upper))


def test_more_positions_than_the_arithmetic_holds_are_refused():
    with pytest.raises(AssertionError, match="overflow"):
        positions(0, "w", 2**40, 2**31)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 4), (990, 1000), (17, 823), (500, 500)])
def test_a_slice_is_the_slice_of_the_whole(start, stop):
    whole = positions(2, "w", 123_457, 1000)
    assert torch.equal(positions(2, "w", 123_457, 1000, start, stop), whole[start:stop])


def test_a_slice_costs_its_own_length():
    # All 2**31 - 1 positions would take 16 GiB.
    assert positions(0, "w", 2**40, 2**31 - 1, 2**30, 2**30 + 5).numel() == 5


@pytest.mark.parametrize(("seed", "name"), [(1, "a"), (0, "b"), (0, "a "), (10, "a")])
def test_other_seeds_and_names_draw_other_positions(seed, name):
    one, other = positions(0, "a", 10**6, 1000), positions(seed, name, 10**6, 1000)
    # Blocks hold 1,000 scalars, so independent draws agree about once.
    assert (one == other).sum() < 10


def test_offsets_inside_the_blocks_are_uniform():
    block, count = 50, 100_000
    offsets = positions(0, "w", block * count, count) - torch.arange(count) * block
    observed = torch.bincount(offsets, minlength=block).double()
    expected = count / block
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    # 49 degrees of freedom: mean 49, standard deviation 9.9
    assert 25 < chi_square < 85


def test_offsets_of_neighbouring_blocks_are_independent():
    block, count = 10, 100_000
    offsets = positions(0, "w", block * count, count) - torch.arange(count) * block
    pairs = torch.bincount(offsets[:-1] * block + offsets[1:], minlength=block**2).double()
    expected = (count - 1) / block**2
    chi_square = ((pairs - expected) ** 2 / expected).sum().item()
    # 99 degrees of freedom: mean 99, standard deviation 14
    assert 57 < chi_square < 150


def test_the_checksum_sees_each_position_and_their_order():
    drawn = positions(0, "w", 10**6, 300_000)
    changed = drawn.clone()
    changed[-1] += 1
    assert len({checksum(drawn), checksum(changed), checksum(drawn[:-1]), checksum(drawn.flip(0))}) == 4


# budget


@pytest.mark.parametrize("density", [0.001, 0.0123456, 0.1, 1 / 3, 0.6])
@pytest.mark.parametrize("fully_trained", [0, 770])
def test_counts_add_up_to_the_density_of_the_whole_model(density, fully_trained):
    sizes = {"a": 333_331, "b": 77, "c": 500_009, "d": 1}
    total = 1_234_567
    counts = budget(density, total, fully_trained, sizes)
    assert sum(counts.values()) + fully_trained == round(density * total)
    assert list(counts) == list(sizes)
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)


def test_counts_are_proportional_to_the_sizes():
    sizes = {f"w{i}": size for i, size in enumerate([4096 * 4096, 1024 * 4096, 4096 * 14336, 999])}
    counts = budget(0.01, sum(sizes.values()), 0, sizes)
    for name, size in sizes.items():
        assert abs(counts[name] - 0.01 * size) < 1


def test_the_smallest_weights_get_one_scalar_each_at_the_cost_of_the_largest():
    sizes = {"huge": 10**6, **{f"tiny{i}": 2 for i in range(5)}}
    assert budget(10 / 2_000_000, 2_000_000, 0, sizes) == {"huge": 5, **{f"tiny{i}": 1 for i in range(5)}}


def test_density_one_selects_everything():
    assert budget(1.0, 60, 10, {"a": 20, "b": 30}) == {"a": 20, "b": 30}


def test_too_dense_for_the_targets():
    with pytest.raises(UserError) as error:
        budget(0.5, 1000, 100, {"a": 200, "b": 33})
    message = str(error.value)
    assert all(number in message for number in ("0.5", "1,000", "500", "333", "0.333,")), message


def test_too_sparse_for_the_fully_trained_modules():
    with pytest.raises(UserError) as error:
        budget(0.01, 10_000, 150, {"a": 200, "b": 33})
    message = str(error.value)
    assert all(number in message for number in ("0.01", "10,000", "100", "150", "2 targets", "0.0152,")), message


def test_fewer_scalars_than_targets():
    with pytest.raises(UserError, match=r"too few for 3 targets: raise the density to at least 0\.0003,"):
        budget(0.0002, 10_000, 0, {"a": 100, "b": 100, "c": 100})


def test_the_advised_density_is_rounded_to_the_possible_side():
    with pytest.raises(UserError, match=r"at most 0\.6666,"):
        budget(1.0, 30_000_000, 0, {"a": 20_000_000})
    with pytest.raises(UserError, match=r"at least 0\.3334,"):
        budget(0.1, 30_000_000, 9_999_999, {"a": 20_000_000})


@pytest.mark.parametrize("total", [601, 7_919, 22_713_216, 8_030_261_248])
def test_the_density_that_an_error_advises_is_possible(total):
    sizes, fully_trained = {"a": math.isqrt(total), "b": total // 3}, total // 7
    for density in (1.0, 1e-9):
        with pytest.raises(UserError) as error:
            budget(density, total, fully_trained, sizes)
        advised = float(re.search(r"at (?:most|least) (0\.\d+)", str(error.value))[1])
        assert sum(budget(advised, total, fully_trained, sizes).values()) + fully_trained == round(advised * total)
