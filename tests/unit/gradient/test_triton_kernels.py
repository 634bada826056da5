"""The kernels compared with dense products, on a GPU if there is one, else in Triton's interpreter."""

import importlib.util
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_zero.gradient import cpu
from sparse_zero.gradient import sampled as sampled_gradient
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.selection import draws

if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

from triton_cases import BAD_STRIPS, DEVICE, bad_strips, inside, interpret

from sparse_zero.gradient import triton_kernels

BOUND = sampled_gradient.TRANSIENT_BYTES
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "backwards-padded": lambda x: torch.cat([x + 1, x], dim=1)[:, x.shape[1] :],
    "one-row": lambda x: x[:1].expand_as(x),
    "one-column": lambda x: x[:, :1].expand_as(x),
    "scalar": lambda x: x.new_ones(()).expand_as(x),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    torch.manual_seed(0)
    interpret(monkeypatch, triton_kernels)


def operands(N: int, R: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, R).to(DEVICE, dtype), torch.randn(N, C).to(DEVICE, dtype)


def draw(R: int, C: int, density: float) -> torch.Tensor:
    """Sorted positions in a flattened (R, C) matrix, at least one."""
    return torch.randperm(R * C)[: max(1, round(density * R * C))].sort().values.to(DEVICE)


def draw_strips(R: int, C: int, granularity: int, count: int) -> tuple[torch.Tensor, Pattern]:
    """Positions of stratified-v1 and their pattern."""
    flat = draws.stratified_strips(3, "weight", (R, C), count * granularity, granularity)
    return flat.to(DEVICE), strip_pattern(flat, R, C, granularity)


def strip_pattern(flat: torch.Tensor, R: int, C: int, granularity: int) -> Pattern:
    """The pattern of some strips, given their positions."""
    first = flat[flat // C % granularity == 0]
    return Pattern((first // (C * granularity) * C + first % C).int().to(DEVICE), R, C, granularity)


def assert_close(result: torch.Tensor, rows_NR: torch.Tensor, columns_NC: torch.Tensor, flat: torch.Tensor) -> None:
    """Half-precision operands are exact in float32, so the tolerance is the same as for float32 operands."""
    reference = (rows_NR.double().t() @ columns_NC.double()).flatten()[flat]
    assert result.dtype == torch.float32
    scale = max(1.0, rows_NR.shape[0] ** 0.5)
    torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=2e-6 * scale)


def assert_sampled(rows_NR, columns_NC, flat, bound=BOUND) -> torch.Tensor:
    pattern = Pattern(flat, rows_NR.shape[1], columns_NC.shape[1])
    result = triton_kernels.sampled(rows_NR, columns_NC, pattern, bound)
    assert_close(result, rows_NR, columns_NC, flat)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [1e-9, 0.03, 0.4, 1.0])
@pytest.mark.parametrize(
    ("N", "R", "C"), [(1, 1, 1), (5, 1, 40), (5, 40, 1), (127, 17, 29), (129, 16, 16), (300, 9, 33)]
)
def test_sampled_equals_the_dense_product(N, R, C, density, dtype):
    assert_sampled(*operands(N, R, C, dtype), draw(R, C, density))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [1, 3, 8, 16, 32, 64])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_strips_equal_the_dense_product_in_the_order_of_the_selection(granularity, count, dtype):
    R, C = 192, 40
    rows, columns = operands(70, R, C, dtype)
    flat, strips = draw_strips(R, C, granularity, count)
    assert_close(triton_kernels.strips(rows, columns, strips, BOUND), rows, columns, flat)


def test_many_strips_in_one_block_of_rows():
    R, C, granularity = 32, 150, 8
    flat = (8 * C + torch.arange(8)[:, None] * C + torch.arange(0, C, 2)).flatten()
    last = (24 + torch.arange(8)) * C + 149
    flat = torch.cat([flat, last])
    rows, columns = operands(40, R, C)
    strips = strip_pattern(flat, R, C, granularity)
    assert strips.block_starts.tolist() == [0, 0, 75, 75, 76]
    assert_close(triton_kernels.strips(rows, columns, strips, BOUND), rows, columns, flat.to(DEVICE))


@pytest.mark.parametrize("granularity", [1, 8, 16])
def test_nan_affects_only_its_own_positions(granularity):
    # Padding is multiplied as well, and must not be stored
    R, C = 48, 40
    rows, columns = operands(20, R, C)
    flat, strips = draw_strips(R, C, granularity, 120 // granularity)
    spoilt = int(strips.strip_columns[0])
    columns[3, spoilt] = torch.nan
    result = triton_kernels.strips(rows, columns, strips, BOUND)
    assert torch.equal(result.isnan(), flat % C == spoilt)
    flat = draw(R, C, 0.1)
    result = triton_kernels.sampled(rows, columns, Pattern(flat, R, C), BOUND)
    assert torch.equal(result.isnan(), flat % C == spoilt)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_operands_of_any_strides(layout):
    rows, columns = operands(150, 32, 30)
    flat, (strip_flat, strips) = draw(32, 30, 0.1), draw_strips(32, 30, 16, 12)
    for a, b in ((layout(rows), columns), (rows, layout(columns))):
        assert_sampled(a, b, flat)
        assert_close(triton_kernels.strips(a, b, strips, BOUND), a, b, strip_flat)


@pytest.mark.parametrize(
    ("rows_dtype", "columns_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_operands_of_two_dtypes(rows_dtype, columns_dtype):
    rows, columns = operands(50, 16, 20)
    rows, columns = rows.to(rows_dtype), columns.to(columns_dtype)
    assert_sampled(rows, columns, draw(16, 20, 0.3))
    flat, strips = draw_strips(16, 20, 8, 9)
    assert_close(triton_kernels.strips(rows, columns, strips, BOUND), rows, columns, flat)


def test_no_tokens_or_no_positions():
    rows, columns = operands(0, 16, 20)
    flat, strips = draw_strips(16, 20, 8, 9)
    assert torch.equal(assert_sampled(rows, columns, flat.sort().values), torch.zeros(72, device=DEVICE))
    assert triton_kernels.strips(rows, columns, strips, BOUND).count_nonzero() == 0
    rows, columns = operands(5, 16, 20)
    nowhere = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert assert_sampled(rows, columns, nowhere).shape == (0,)
    assert triton_kernels.strips(rows, columns, Pattern(nowhere, 16, 20, 8), BOUND).shape == (0,)
    triton_kernels.gather(columns, 0, Pattern(nowhere, 5, 20), nowhere.float())


@pytest.mark.parametrize("used", [[0], [49], [7, 8, 31]])
def test_rows_of_the_weight_without_positions(used):
    rows, columns = operands(9, 50, 140)
    flat = torch.cat([row * 140 + torch.arange(0, 140, 2, device=DEVICE) for row in used])
    assert_sampled(rows, columns, flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 16, 40, 128, 10_000])
def test_temporary_memory_is_within_the_limit(tokens, dtype):
    N, R, C = 400, 32, 30
    bound = tokens * (R + C) * dtype.itemsize
    rows, columns = operands(N, R, C, dtype)
    # Not a multiple of a tile: the padding of the last tile must not be stored
    flat, (strip_flat, strips) = draw(R, C, 0.105), draw_strips(R, C, 16, 12)
    assert strips.block_starts.numel() == 3
    pattern = Pattern(flat, R, C)
    with AllocatedBytes() as allocated:
        result = triton_kernels.sampled(rows, columns, pattern, bound)
    assert_close(result, rows, columns, flat)
    least = 16 * (R + C) * dtype.itemsize
    assert 0 < allocated.bytes - result.nbytes <= max(bound, least)
    with AllocatedBytes() as allocated:
        result = triton_kernels.strips(rows, columns, strips, bound)
    assert_close(result, rows, columns, strip_flat)
    assert 0 < allocated.bytes - result.nbytes <= max(bound, least)


def test_a_sum_does_not_depend_on_the_other_positions():
    # This also shows that the order of the sums does not depend on the scheduler
    rows, columns = operands(300, 24, 40, torch.bfloat16)
    flat = draw(24, 40, 1.0)
    whole = assert_sampled(rows, columns, flat)
    some = draw(24, 40, 0.1)
    assert torch.equal(assert_sampled(rows, columns, some), whole[some])
    assert torch.equal(assert_sampled(rows, columns, flat), whole)


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits(transposed):
    """Of the last token, or of the last row of the weight. Only a few pages of the memory are used."""
    N, R, C = 3, 16, 20
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    rows = storage.as_strided((N, R), (1, 2**31 // 15 + 1) if transposed else (2**30 + 5, 1))
    rows.copy_(torch.randn(N, R))
    columns = operands(N, R, C, torch.bfloat16)[1]
    assert_sampled(rows, columns, draw(R, C, 0.2))
    flat, strips = draw_strips(R, C, 16, 5)
    assert_close(triton_kernels.strips(rows, columns, strips, BOUND), rows, columns, flat)


@pytest.mark.parametrize("cheaper", [True, False])
def test_single_positions_use_the_cheaper_method(monkeypatch, cheaper):
    rows, columns = operands(20, 16, 20, torch.bfloat16)
    flat = draw(16, 20, 0.2)
    queries, ran = [], []
    monkeypatch.setattr(sampled_gradient, "kernel_is_cheaper", lambda *a: queries.append(a) or cheaper)
    kernel = triton_kernels.sampled
    monkeypatch.setattr(triton_kernels, "sampled", lambda *a: ran.append(a) or kernel(*a))
    pattern = Pattern(flat, 16, 20)
    # The function for GPUs: on a CPU sampled_product uses other methods
    result = sampled_gradient._on_accelerator(rows, columns, pattern, BOUND)
    torch.testing.assert_close(
        result.double(), (rows.double().t() @ columns.double()).flatten()[flat], rtol=1e-2, atol=1e-2
    )
    assert [a[2:] for a in queries] == [(64, 1, BOUND)]
    assert [a[3] for a in ran] == [BOUND] * cheaper


@pytest.mark.parametrize("cheaper", [True, False])
def test_strips_use_the_cheaper_method(monkeypatch, cheaper):
    rows, columns = operands(20, 32, 20, torch.bfloat16)
    flat, strips = draw_strips(32, 20, 16, 6)
    monkeypatch.setattr(sampled_gradient, "kernel_is_cheaper", lambda *a: cheaper)
    kernel, ran = triton_kernels.strips, []
    monkeypatch.setattr(triton_kernels, "strips", lambda *a: ran.append(a) or kernel(*a))
    result = sampled_gradient._on_accelerator(rows, columns, strips, BOUND)
    torch.testing.assert_close(
        result.double(), (rows.double().t() @ columns.double()).flatten()[flat], rtol=1e-2, atol=1e-2
    )
    assert len(ran) == cheaper


@pytest.mark.parametrize("granularity", [1, 3, 16])
@pytest.mark.parametrize("room", [1, 2, 100], ids=["1 block", "2 blocks", "all"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_dense_product_is_read_chunk_by_chunk(monkeypatch, dtype, room, granularity):
    R, C = 96, 20
    rows, columns = operands(30, R, C, dtype)
    strip_indices = draw(R // granularity, C, 0.3).int()
    pattern = Pattern(strip_indices, R, C, granularity)
    bound = 2 * room * granularity * C * dtype.itemsize
    # In float32 or float64, so that early rounding does not look like a wrong sum
    wide = torch.promote_types(dtype, torch.float32)
    expected = sampled_gradient._dense(rows.to(wide), columns.to(wide), pattern, wide, 64 * bound)
    monkeypatch.setattr(sampled_gradient, "has_kernels", lambda tensor: True)
    gather, calls = triton_kernels.gather, []
    monkeypatch.setattr(triton_kernels, "gather", lambda *a: calls.append(a) or gather(*a))
    result = sampled_gradient._dense(rows, columns, pattern, dtype, bound)
    assert result.dtype == wide
    tolerance = 1e-5 if dtype.itemsize > 2 else 2e-2
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    # Without strips and with one chunk only, the positions are the strip indices
    assert len(calls) == (-(-R // granularity // room) if room < 100 or granularity > 1 else 0)


def test_a_strip_index_above_32_bits_is_read():
    columns = 2**16
    strip_indices = torch.tensor([5, 2**31 - 1, 2**31 + 3, 2**31 + columns + 1], device=DEVICE)
    result = torch.zeros(4, device=DEVICE)
    row = torch.arange(columns, dtype=torch.float32, device=DEVICE)[None]
    triton_kernels.gather(row, 2**15, Pattern(strip_indices, 2**15 + 2, columns), result)
    assert result.tolist() == [0, 0, 3, 0]


def test_arguments_that_do_not_fit_are_refused():
    rows, columns = operands(5, 16, 20)
    strip_indices = torch.tensor([3, 7], device=DEVICE)
    for kernel in (triton_kernels.sampled, triton_kernels.strips):
        with pytest.raises(AssertionError):
            kernel(rows, columns, Pattern(strip_indices, 20, 16), BOUND)
    with pytest.raises(AssertionError):
        triton_kernels.gather(rows, 0, Pattern(strip_indices, 16, 16), torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("name", BAD_STRIPS)
def test_no_kernel_leaves_its_tensors(monkeypatch, name, granularity):
    """Strip indices that do not fit are left out. They are refused before, by checks.checked_chunks."""
    monkeypatch.setattr(cpu, "loaded_operators", lambda tensor: None)
    R, C, g = 64, 20, granularity
    pattern = Pattern(bad_strips(name, R // g * C), R, C, g)
    result, beside = inside(pattern.count)
    triton_kernels.gather(torch.ones(R, C, device=DEVICE), 0, pattern, result)
    rows, columns = torch.ones(5, R, device=DEVICE), torch.ones(5, C, device=DEVICE)
    (triton_kernels.sampled if g == 1 else triton_kernels.strips)(rows, columns, pattern, BOUND)
    assert (beside == -1).sum() == beside.numel() - pattern.count


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        held = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in held:
            self.bytes += output.untyped_storage().nbytes()
        return output
