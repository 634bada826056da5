import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_zero import sampled_gradient
from sparse_zero.sampled_gradient import SAMPLED_BELOW, csr_pattern, flat_positions, sampled_product

SPARSE, DENSE = SAMPLED_BELOW / 4, 0.5
"""Densities on either side of the switch between the two ways to compute."""


def draw(rows: int, columns: int, density: float) -> torch.Tensor:
    """Sorted positions in a flattened (rows, columns) matrix, at least one."""
    count = max(1, round(density * rows * columns))
    return torch.randperm(rows * columns)[:count].sort().values


def operands(N: int, R: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, R).to(dtype), torch.randn(N, C).to(dtype)


def reference(rows_NR: torch.Tensor, columns_NC: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The dense product in float64, gathered."""
    return (rows_NR.double().t() @ columns_NC.double()).flatten()[flat]


def assert_product(rows_NR: torch.Tensor, columns_NC: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    pattern = csr_pattern(flat, rows_NR.shape[1], columns_NC.shape[1])
    result = sampled_product(rows_NR, columns_NC, *pattern)
    scale = max(1.0, rows_NR.shape[0] ** 0.5)
    torch.testing.assert_close(
        result.double(), reference(rows_NR, columns_NC, flat), rtol=1e-5, atol=1e-6 * scale, check_dtype=False
    )
    return result


class LargestOutput(TorchDispatchMode):
    """Bytes of the largest tensor that an operation allocates (views and in-place results are not allocations)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        held = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor) and is_strided(a)}
        if isinstance(output, torch.Tensor) and is_strided(output):
            storage = output.untyped_storage()
            if storage.data_ptr() not in held:
                self.bytes = max(self.bytes, storage.nbytes())
        return output


def is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("density", [1e-9, 0.01, SPARSE, DENSE, 1.0])
@pytest.mark.parametrize(
    ("N", "R", "C"), [(1, 1, 1), (5, 1, 40), (5, 40, 1), (33, 17, 29), (64, 128, 96), (3, 200, 7)]
)
def test_equals_the_dense_product_gathered(N, R, C, density):
    assert_product(*operands(N, R, C), draw(R, C, density))


@pytest.mark.parametrize("density", [SPARSE, DENSE])
@pytest.mark.parametrize(
    ("rows_dtype", "columns_dtype", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_sums_in_float32_or_better(rows_dtype, columns_dtype, expected, density):
    # Half precision operands are exact in float32, so the float64 reference is met as closely as by float32 ones.
    rows, columns = operands(300, 24, 40)
    result = assert_product(rows.to(rows_dtype), columns.to(columns_dtype), draw(24, 40, density))
    assert result.dtype == expected


def test_an_empty_batch_gives_zeros():
    for density in (SPARSE, DENSE):
        flat = draw(6, 8, density)
        result = sampled_product(*operands(0, 6, 8), *csr_pattern(flat, 6, 8))
        assert torch.equal(result, torch.zeros(flat.numel()))


@pytest.mark.parametrize("density", [SPARSE, DENSE])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x.new_ones(()).expand_as(x),
    ],
    ids=["transposed", "strided", "one-row", "one-column", "scalar"],
)
def test_operands_of_any_strides(layout, density):
    rows, columns = operands(12, 20, 30)
    flat = draw(20, 30, density)
    assert_product(layout(rows), columns, flat)
    assert_product(rows, layout(columns), flat)


def test_rows_of_the_weight_without_positions():
    rows, columns = operands(9, 50, 40)
    for used in ([0], [49], [7, 8, 31]):
        flat = torch.cat([row * 40 + torch.arange(0, 40, 3) for row in used])
        assert_product(rows, columns, flat)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 7, 24, 25, 1000])
def test_dense_product_in_chunks(monkeypatch, rows_per_chunk):
    R, C = 25, 30
    monkeypatch.setattr(sampled_gradient, "TRANSIENT_BYTES", rows_per_chunk * C * 4)
    rows, columns = operands(40, R, C)
    assert_product(rows, columns, draw(R, C, DENSE))
    assert_product(rows, columns, draw(R, C, 1.0))


def test_chunks_that_hold_no_position(monkeypatch):
    R, C = 24, 10
    monkeypatch.setattr(sampled_gradient, "TRANSIENT_BYTES", 4 * C * 4)
    rows, columns = operands(5, R, C)
    full = torch.arange(C)
    # Chunks of four rows: the first, some in the middle and the last one are empty
    flat = torch.cat([row * C + full for row in (4, 7, 16, 17, 18)])
    assert_product(rows, columns, flat)


def test_a_chunk_holds_at_least_one_row(monkeypatch):
    monkeypatch.setattr(sampled_gradient, "TRANSIENT_BYTES", 1)
    assert_product(*operands(5, 6, 8), draw(6, 8, DENSE))


def test_the_sampled_way_never_holds_the_whole_product():
    R, C = 512, 512
    rows, columns = operands(8, R, C)
    pattern = csr_pattern(draw(R, C, 0.01), R, C)
    with LargestOutput() as largest:
        sampled_product(rows, columns, *pattern)
    assert 0 < largest.bytes <= 0.02 * R * C * 4


def test_the_dense_way_holds_no_more_than_its_bound(monkeypatch):
    R, C = 512, 512
    bound = R * C * 4 // 4
    monkeypatch.setattr(sampled_gradient, "TRANSIENT_BYTES", bound)
    rows, columns = operands(8, R, C)
    flat = draw(R, C, 0.2)
    pattern = csr_pattern(flat, R, C)
    with LargestOutput() as largest:
        sampled_product(rows, columns, *pattern)
    assert bound // 2 < largest.bytes <= bound


@pytest.mark.parametrize(("R", "C"), [(1, 1), (1, 9), (9, 1), (12, 31)])
@pytest.mark.parametrize("density", [1e-9, 0.3, 1.0])
def test_a_pattern_gives_its_positions_back(R, C, density):
    flat = draw(R, C, density)
    row_starts, column_index = csr_pattern(flat, R, C)
    mask = torch.zeros(R, C, dtype=torch.bool)
    mask.view(-1)[flat] = True
    reference = mask.to(torch.float32).to_sparse_csr()
    assert row_starts.dtype == column_index.dtype == torch.int32
    assert row_starts.tolist() == reference.crow_indices().tolist()
    assert column_index.tolist() == reference.col_indices().tolist()
    assert torch.equal(flat_positions(row_starts, column_index, C), flat)
