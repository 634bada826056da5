"""The numbers of trained scalars of each target."""

import math
import re

import pytest

from sparse_zero.errors import UserError
from sparse_zero.selection.budget import counts_for_density, counts_for_rank


@pytest.mark.parametrize("density", [0.001, 0.0123456, 0.1, 1 / 3, 0.6])
@pytest.mark.parametrize("fully_trained", [0, 770])
def test_counts_add_up_to_the_density_of_the_whole_model(density, fully_trained):
    sizes = {"a": 333_331, "b": 77, "c": 500_009, "d": 1}
    total = 1_234_567
    counts = counts_for_density(density, total, fully_trained, sizes)
    assert sum(counts.values()) + fully_trained == round(density * total)
    assert list(counts) == list(sizes)
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)


def test_counts_are_proportional_to_the_sizes():
    sizes = {f"w{i}": size for i, size in enumerate([4096 * 4096, 1024 * 4096, 4096 * 14336, 999])}
    counts = counts_for_density(0.01, sum(sizes.values()), 0, sizes)
    for name, size in sizes.items():
        assert abs(counts[name] - 0.01 * size) < 1


def test_the_smallest_weights_get_one_scalar_each_from_the_largest():
    sizes = {"huge": 10**6, **{f"tiny{i}": 2 for i in range(5)}}
    assert counts_for_density(10 / 2_000_000, 2_000_000, 0, sizes) == {"huge": 5, **{f"tiny{i}": 1 for i in range(5)}}


def test_density_one_selects_everything():
    assert counts_for_density(1.0, 60, 10, {"a": 20, "b": 30}) == {"a": 20, "b": 30}


def test_too_dense_for_the_targets():
    with pytest.raises(UserError) as error:
        counts_for_density(0.5, 1000, 100, {"a": 200, "b": 33})
    message = str(error.value)
    assert all(number in message for number in ("0.5", "1,000", "500", "333", "0.333,")), message


def test_too_sparse_for_the_fully_trained_modules():
    with pytest.raises(UserError) as error:
        counts_for_density(0.01, 10_000, 150, {"a": 200, "b": 33})
    message = str(error.value)
    assert all(number in message for number in ("0.01", "10,000", "100", "150", "2 targets", "0.0152,")), message


def test_fewer_scalars_than_targets():
    with pytest.raises(UserError, match=r"too few for 3 targets: raise the density to at least 0\.0003,"):
        counts_for_density(0.0002, 10_000, 0, {"a": 100, "b": 100, "c": 100})


def test_the_suggested_density_is_rounded_to_a_possible_one():
    with pytest.raises(UserError, match=r"at most 0\.6666,"):
        counts_for_density(1.0, 30_000_000, 0, {"a": 20_000_000})
    with pytest.raises(UserError, match=r"at least 0\.3334,"):
        counts_for_density(0.1, 30_000_000, 9_999_999, {"a": 20_000_000})


@pytest.mark.parametrize("total", [601, 7_919, 22_713_216, 8_030_261_248])
def test_the_density_that_an_error_suggests_is_possible(total):
    sizes, fully_trained = {"a": math.isqrt(total), "b": total // 3}, total // 7
    for density in (1.0, 1e-9):
        with pytest.raises(UserError) as error:
            counts_for_density(density, total, fully_trained, sizes)
        advised = float(re.search(r"at (?:most|least) (0\.\d+)", str(error.value))[1])
        assert sum(counts_for_density(advised, total, fully_trained, sizes).values()) + fully_trained == round(
            advised * total
        )


def test_an_error_names_the_setting_and_suggests_targets():
    with pytest.raises(UserError, match=r"sparse.sparsity: 0.1 requires 900 .* or add targets \(mlp, up_proj\)"):
        counts_for_density(0.9, 1000, 0, {"a": 500}, setting="sparsity: 0.1", untargeted=["mlp", "up_proj"])


@pytest.mark.parametrize("granularity", [2, 8, 64])
def test_counts_are_whole_strips(granularity):
    sizes = {"a": 64 * 1000, "bias": 77, "b": 64 * 313}
    steps = {"a": granularity, "b": granularity}
    counts = counts_for_density(0.05, 200_000, 500, sizes, steps)
    assert counts["a"] % granularity == counts["b"] % granularity == 0
    assert all(count > 0 for count in counts.values())
    assert 0 <= round(0.05 * 200_000) - 500 - sum(counts.values()) < 3 * granularity


def test_each_target_gets_at_least_one_strip():
    counts = counts_for_density(17 / 1000, 1000, 0, {"a": 900, "bias": 7}, {"a": 16})
    assert counts == {"a": 16, "bias": 1}


def test_rank_equivalent_is_the_number_of_lora_scalars():
    matrices = {"v": (1, 64, 256), "experts": (8, 32, 16), "conv": (1, 6, 4 * 9)}
    assert counts_for_rank(2, matrices) == {"v": 2 * (64 + 256), "experts": 8 * 2 * (32 + 16), "conv": 2 * (6 + 36)}
    assert counts_for_rank(2, matrices, {"v": 64})["v"] == 640


@pytest.mark.parametrize(
    ("rank", "matrix", "message"),
    [
        (1, None, "w is a vector, and only matrices have a rank"),
        (9, (1, 16, 16), r"9 \* \(16 \+ 16\) exceeds the 256 scalars of w: lower it to at most 8, or remove"),
        (
            1,
            (1, 1, 16),
            r"1 \* \(1 \+ 16\) exceeds the 16 scalars of w: remove it from the targets \(exclude_modules\)",
        ),
    ],
)
def test_impossible_ranks(rank, matrix, message):
    with pytest.raises(UserError, match=message):
        counts_for_rank(rank, {"w": matrix})
