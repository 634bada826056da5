"""The selection rules: compared with slow references, golden positions, and their statistics."""

import itertools

import pytest
import torch
from rule_cases import blockwise, hashes, sha256
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_zero.selection.checks import checksum
from sparse_zero.selection.draws import BERNOULLI, STRATIFIED, by_magnitude, stratified_positions
from sparse_zero.selection.rules import STORED, Selection

V_PROJ = "model.layers.0.self_attn.v_proj.weight"


def reference(seed: int, name: str, numel: int, count: int) -> list[int]:
    return blockwise("stratified-v1", seed, name, numel, count)


def strips(seed: int, name: str, rows: int, columns: int, count: int, granularity: int) -> list[int]:
    """stratified-v1 with strips: each is `granularity` rows of one column."""
    cells = reference(seed, name, rows * columns // granularity, count // granularity)
    tops = [(cell // columns * granularity, cell % columns) for cell in cells]
    return sorted((top + k) * columns + column for top, column in tops for k in range(granularity))


# Adapters do not store these positions: every earlier adapter depends on these numbers. A new rule gets a new name.
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
    drawn = stratified_positions(seed, name, numel, count)
    assert STRATIFIED == "stratified-v1"
    assert drawn[: len(first)].tolist() == first
    assert sha256(drawn) == expected


@pytest.mark.parametrize(("numel", "count"), [(1, 1), (7, 7), (1000, 999), (1000, 501), (4096, 41), (2**61, 300)])
def test_agrees_with_unbounded_integers(numel, count):
    assert stratified_positions(5, V_PROJ, numel, count).tolist() == reference(5, V_PROJ, numel, count)


@pytest.mark.parametrize(("numel", "count"), [(1, 1), (100, 100), (101, 100), (199, 100), (12345, 1234)])
def test_one_position_in_each_block(numel, count):
    drawn = stratified_positions(0, "w", numel, count).tolist()
    assert len(drawn) == count
    for i, position in enumerate(drawn):
        assert i * numel // count <= position < (i + 1) * numel // count


@pytest.mark.parametrize("numel", [2**40, 2**62 - 1])
def test_huge_weights_do_not_overflow(numel):
    count = 2**31 - 1
    start = count - 1000
    drawn = stratified_positions(0, "experts", numel, count, start)
    lower = torch.tensor([i * numel // count for i in range(start, count)])
    upper = torch.tensor([(i + 1) * numel // count for i in range(start, count)])
    assert torch.all((lower <= drawn) & (drawn < upper))


def test_too_many_positions_for_the_arithmetic_are_an_error():
    with pytest.raises(AssertionError, match="overflow"):
        stratified_positions(0, "w", 2**40, 2**31)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 4), (990, 1000), (17, 823), (500, 500)])
def test_a_slice_is_the_slice_of_the_whole(start, stop):
    whole = stratified_positions(2, "w", 123_457, 1000)
    assert torch.equal(stratified_positions(2, "w", 123_457, 1000, start, stop), whole[start:stop])


def test_the_cost_of_a_slice_is_that_of_its_length():
    # All 2**31 - 1 positions would take 16 GiB.
    assert stratified_positions(0, "w", 2**40, 2**31 - 1, 2**30, 2**30 + 5).numel() == 5


@pytest.mark.parametrize(("seed", "name"), [(1, "a"), (0, "b"), (0, "a "), (10, "a")])
def test_other_seeds_and_names_draw_other_positions(seed, name):
    one, other = stratified_positions(0, "a", 10**6, 1000), stratified_positions(seed, name, 10**6, 1000)
    # Blocks hold 1,000 scalars, so independent draws agree about once.
    assert (one == other).sum() < 10


def test_offsets_inside_the_blocks_are_uniform():
    block, count = 50, 100_000
    offsets = stratified_positions(0, "w", block * count, count) - torch.arange(count) * block
    observed = torch.bincount(offsets, minlength=block).double()
    expected = count / block
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    # 49 degrees of freedom: mean 49, standard deviation 9.9
    assert 25 < chi_square < 85


def test_offsets_of_neighbouring_blocks_are_independent():
    block, count = 10, 100_000
    offsets = stratified_positions(0, "w", block * count, count) - torch.arange(count) * block
    pairs = torch.bincount(offsets[:-1] * block + offsets[1:], minlength=block**2).double()
    expected = (count - 1) / block**2
    chi_square = ((pairs - expected) ** 2 / expected).sum().item()
    # 99 degrees of freedom: mean 99, standard deviation 14
    assert 57 < chi_square < 150


def test_the_checksum_depends_on_each_position_and_their_order():
    drawn = stratified_positions(0, "w", 10**6, 300_000)
    changed = drawn.clone()
    changed[-1] += 1
    assert len({checksum(drawn), checksum(changed), checksum(drawn[:-1]), checksum(drawn.flip(0))}) == 4


# Strips


@pytest.mark.parametrize("granularity", [2, 3, 8, 24])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(24, 7), (48, 1), (3, 24, 5), (2, 2, 24, 10)])
def test_strips_are_rows_of_one_column(shape, share, granularity):
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    count = max(1, round(share * rows * columns / granularity)) * granularity
    selection = Selection(STRATIFIED, "w", shape, count, seed=4, granularity=granularity)
    expected = strips(4, "w", rows, columns, count, granularity)
    assert selection.positions().tolist() == expected
    for start, stop in ((0, 1), (count // 3, count // 2 + 1), (count - 1, count)):
        assert selection.slice(start, stop).tolist() == expected[start:stop]


def test_strips_of_one_scalar_are_single_scalars():
    selection = Selection(STRATIFIED, "w", (40, 30), 111, seed=4)
    assert selection.positions().tolist() == strips(4, "w", 40, 30, 111, 1)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(STRATIFIED, V_PROJ, (4096, 4096), 167_776, granularity=16), "e9c43c033e8da5eb"),
        (Selection(STRATIFIED, "experts", (64, 1024, 512), 3_200, seed=5, granularity=64), "329ee6250f5d8a5b"),
        (Selection.bernoulli(V_PROJ, (1024, 4096), 0.01, 0), "5e57dd7a1b8b6b12"),
        (Selection(STRATIFIED, "embed", (100, 16), 300, seed=1, whole_rows=(3, 4, 99)), "d3803877de1383e9"),
    ],
    ids=["strips-16", "strips-64", "bernoulli", "whole-rows"],
)
def test_golden_positions_of_the_other_rules(selection, expected):
    assert sha256(selection.positions()) == expected


@pytest.mark.parametrize(
    "selection",
    [
        Selection(STRATIFIED, "w", (480, 300), 50_000, seed=4),
        Selection(STRATIFIED, "w", (4, 480, 300), 320_000, seed=4, granularity=8),
        Selection.bernoulli("w", (3000, 300), 0.1, 0),
        Selection(STRATIFIED, "w", (480, 300), 50_000, seed=1, whole_rows=(3, 4, 99)),
    ],
    ids=["scalars", "strips", "bernoulli", "whole-rows"],
)
def test_a_slice_of_the_strips(selection):
    flat, columns, g = selection.positions(), selection.shape[-1], selection.granularity
    cells = torch.unique(flat // columns // g * columns + flat % columns)
    for start, stop in ((0, None), (0, 1), (7, 39_000), (32_000, 32_001), (100, 100)):
        found = torch.cat([torch.empty(0, dtype=torch.int64), *selection.strip_chunks("cpu", start, stop)])
        assert torch.equal(found, cells[start:stop])


# Bernoulli


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.3, 1.0])
def test_bernoulli_draws_each_scalar_by_its_hash(probability):
    selection = Selection.bernoulli("w", (50, 60), probability, seed=9)
    drawn = hashes("bernoulli-v1", 9, "w", 3000)
    assert selection.rule == BERNOULLI == "bernoulli-v1"
    assert selection.positions().tolist() == [i for i, h in enumerate(drawn) if h < probability * 2**63]
    assert selection.count == len(selection.positions())


def test_bernoulli_counts_are_binomial():
    counts = torch.tensor([Selection.bernoulli("w", (200, 500), 0.02, seed).count for seed in range(60)]).double()
    # Mean 2000, deviation 44; the deviation of the mean of 60 is 5.7, that of their deviation 4.1
    assert abs(counts.mean() - 2000) < 25
    assert 28 < counts.std() < 60


# Whole rows


@pytest.mark.parametrize("rows", [(0,), (9,), (2, 3, 7), tuple(range(10))])
@pytest.mark.parametrize("others", [0, 20])
def test_whole_rows_are_selected_and_the_rule_selects_from_the_others(rows, others):
    if len(rows) == 10:
        others = 0
    selection = Selection(STRATIFIED, "w", (10, 6), len(rows) * 6 + others, seed=3, whole_rows=rows)
    flat = selection.positions()
    assert torch.equal(flat, flat.unique())
    assert flat.numel() == selection.count
    assert selection.whole_row_scalars == len(rows) * 6
    inside = [position for position in flat.tolist() if position // 6 in rows]
    assert inside == [row * 6 + column for row in rows for column in range(6)]
    # The rule selects from a weight that consists of the other rows.
    kept = [row for row in range(10) if row not in rows]
    drawn = reference(3, "w", len(kept) * 6, others) if others else []
    assert [p for p in flat.tolist() if p // 6 not in rows] == [kept[p // 6] * 6 + p % 6 for p in drawn]


# Magnitude and stored positions


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 37, 599, 600])
def test_magnitude(smallest, dtype, count):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = weight.flatten().float().abs().sort(descending=not smallest, stable=True).indices
    assert by_magnitude(weight, count, smallest).tolist() == order[:count].sort().values.tolist()


def test_magnitude_selects_the_first_of_equal_scalars():
    assert by_magnitude(torch.tensor([1.0, -2, 2, 0, 2, 1]), 2).tolist() == [1, 2]
    assert by_magnitude(torch.tensor([1.0, -2, 2, 0, -1, 1]), 3, smallest=True).tolist() == [0, 3, 4]


def test_magnitude_selects_whole_rows_first():
    weight = torch.tensor([[9.0, 8.0], [0.1, 0.2], [7.0, 1.0]])
    assert by_magnitude(weight, 3, rows=(1,)).tolist() == [0, 2, 3]
    assert by_magnitude(weight, 3, smallest=True, rows=(1,)).tolist() == [2, 3, 5]


def test_stored_positions_cannot_be_drawn():
    with pytest.raises(ValueError, match="stored positions cannot be drawn"):
        Selection(STORED, "w", (4, 4), 3).positions()


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if isinstance(output, torch.Tensor):
            self.bytes = max(self.bytes, output.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("rule", [STRATIFIED, BERNOULLI])
def test_one_percent_of_eight_billion_needs_a_few_megabytes_at_a_time(rule):
    selection = Selection(rule, "w", (8_000, 1_000_000), 80_000_000, probability=0.01)
    with LargestTensor() as largest:
        taken = sum(chunk.numel() for chunk in itertools.islice(selection.chunks(), 100))
    assert taken > 200_000
    assert 0 < largest.bytes <= 2 * 2**20
