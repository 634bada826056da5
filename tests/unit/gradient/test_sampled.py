"""The sampled gradient on a CPU, by each method, and patterns of positions."""

import gc
from collections.abc import Callable

import pytest
import torch
from peak_bytes import peak_bytes

from sparse_zero.gradient import cpu, sampled
from sparse_zero.gradient import pattern as pattern_module
from sparse_zero.gradient.pattern import AllScalars, Pattern
from sparse_zero.gradient.sampled import _METHODS, cheaper_method, embedding_product, sampled_product
from sparse_zero.selection.draws import stratified_strips

METHODS = [("sampled", 1), ("sampled", 4), ("sampled", 2), ("dense", 1), ("dense", 4)]
"""Each method with several granularities."""

MIB = 2**20

ROOM = 80_000
"""A memory limit in bytes that is large enough for the sampled method in all tests with a limit."""


def draw(rows: int, columns: int, density: float, granularity: int = 1) -> torch.Tensor:
    """Random strip indices of a matrix, sorted, at least one."""
    grid = rows // granularity * columns
    return torch.randperm(grid)[: max(1, round(density * grid))].sort().values


def places(strip_indices: torch.Tensor, rows: int, columns: int, granularity: int) -> torch.Tensor:
    """The positions of the strips by their definition: block by block, row by row, column by column."""
    blocks, chosen = strip_indices // columns, strip_indices % columns
    flat = []
    for block in range(rows // granularity):
        for row in range(block * granularity, (block + 1) * granularity):
            flat += [row * columns + column for column in chosen[blocks == block].tolist()]
    return torch.tensor(flat)


def operands(N: int, R: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, R).to(dtype), torch.randn(N, C).to(dtype)


def reference(rows_NR: torch.Tensor, columns_NC: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The dense product in float64, gathered."""
    return (rows_NR.double().t() @ columns_NC.double()).flatten()[flat]


def assert_product(
    method: str,
    rows_NR: torch.Tensor,
    columns_NC: torch.Tensor,
    strip_indices: torch.Tensor,
    granularity: int = 1,
    transient_bytes: int = 64 * MIB,
) -> None:
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    pattern = Pattern(strip_indices, R, C, granularity)
    dtype = torch.promote_types(torch.promote_types(rows_NR.dtype, columns_NC.dtype), torch.float32)
    if method == "sampled" and transient_bytes >= ROOM:
        assert cpu.Tiling.fit(N, C, pattern.count, pattern.granularity, dtype, transient_bytes, 1), (
            "this would be the dense method"
        )
        assert cpu.load_operator()
    result = _METHODS[method](rows_NR, columns_NC, pattern, dtype, transient_bytes)
    assert result.dtype == dtype
    expected = reference(rows_NR, columns_NC, places(strip_indices, R, C, granularity))
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6 * max(1.0, N**0.5))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 1.0])
@pytest.mark.parametrize(
    ("N", "R", "C"), [(1, 4, 1), (5, 4, 40), (5, 40, 1), (33, 16, 29), (300, 64, 96), (129, 200, 7)]
)
@pytest.mark.parametrize(("method", "granularity"), METHODS)
def test_equals_the_dense_product_gathered(method, granularity, N, R, C, density):
    assert_product(method, *operands(N, R, C), draw(R, C, density, granularity), granularity)


@pytest.mark.parametrize(
    ("rows_dtype", "columns_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize(("method", "granularity"), METHODS)
def test_sums_in_float32_or_better(method, granularity, rows_dtype, columns_dtype):
    # Half-precision operands are exact in float32, so the tolerance is the same as for float32 operands.
    rows, columns = operands(300, 24, 40)
    assert_product(method, rows.to(rows_dtype), columns.to(columns_dtype), draw(24, 40, 0.1, granularity), granularity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
@pytest.mark.parametrize(("method", "granularity"), METHODS)
def test_operands_of_any_strides(method, granularity, layout, dtype):
    rows, columns = operands(140, 20, 30, dtype)
    strip_indices = draw(20, 30, 0.2, granularity)
    for bound in (64 * MIB, ROOM, 5000):
        assert_product(method, layout(rows), columns, strip_indices, granularity, bound)
        assert_product(method, rows, layout(columns), strip_indices, granularity, bound)


def test_chunks_of_half_precision_are_not_rounded_one_after_another():
    """The dense method as on an accelerator: in half precision, with float32 sums within a product."""
    rows, columns = (x.t().contiguous().t().bfloat16()[::2] for x in operands(8192, 8, 8))
    rows, columns = (torch.stack([x, x], dim=-1)[..., 0] for x in (rows.abs(), columns.abs()))
    strip_indices = draw(8, 8, 1.0, 1)
    pattern = Pattern(strip_indices, 8, 8)
    result = _METHODS["dense"](rows, columns, pattern, torch.bfloat16, 4096)
    expected = (rows.double().t() @ columns.double()).flatten()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["contiguous", "transposed", "strided", "one-row"],
)
@pytest.mark.parametrize(("R", "C"), [(256, 8), (8, 256), (96, 5), (7, 96), (61, 8), (160, 136), (2, 2)])
def test_all_scalars_equal_the_dense_product(R, C, layout, dtype):
    """In blocks of 128 and of 32 columns, and as a whole; the operands may be padded."""
    plain_rows, plain_columns = operands(75, R, C, dtype)
    for rows, columns in ((layout(plain_rows), plain_columns), (plain_rows, layout(plain_columns))):
        for pattern in (AllScalars(R, C), AllScalars(R - 1, C), AllScalars(R, C - 1)):
            for bound in (64 * MIB, 5000):
                result = sampled_product(rows, columns, pattern, bound)
                assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                expected = (rows.double().t() @ columns.double())[: pattern.rows, : pattern.columns].flatten()
                torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few_first", [False, True])
def test_all_scalars_do_not_depend_on_the_number_of_threads(few_first):
    rows, columns = operands(300, 16, 768) if few_first else operands(300, 768, 16)
    pattern, before = AllScalars(rows.shape[1], columns.shape[1]), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sampled_product(rows, columns, pattern))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("method", "granularity"), METHODS)
@pytest.mark.parametrize("used", [[0], [11], [2, 3, 7]])
def test_blocks_without_strips(method, granularity, used):
    strip_indices = torch.cat([block * 40 + torch.arange(0, 40, 3) for block in used])
    for bound in (64 * MIB, ROOM, 3000):
        assert_product(method, *operands(9, 12 * granularity, 40), strip_indices, granularity, bound)


@pytest.mark.parametrize("bound", [1, 1000, 4000, 16_000, ROOM, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "granularity"), METHODS)
def test_the_result_is_the_same_for_any_memory_limit(method, granularity, dtype, bound):
    for density in (0.05, 1.0):
        assert_product(method, *operands(77, 24, 30, dtype), draw(24, 30, density, granularity), granularity, bound)


def peak_of_transient(function: Callable[[], torch.Tensor]) -> int:
    """Peak memory of a function in bytes, without its result."""
    size = function().untyped_storage().nbytes()
    return peak_bytes(function) - size


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed, strided])
@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("C", [320, 256], ids=["in chunks", "at once"])
@pytest.mark.parametrize(("method", "granularity"), METHODS)
def test_transient_memory_is_within_the_bound(method, granularity, C, density, layout, dtype):
    N, R, bound = 3000, 256, MIB // 2
    rows, columns = map(layout, operands(N, R, C, dtype))
    pattern = Pattern(draw(R, C, density, granularity), R, C, granularity)
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # each has a copy of a chunk
    try:
        peak = peak_of_transient(lambda: _METHODS[method](rows, columns, pattern, torch.float32, bound))
    finally:
        torch.set_num_threads(before)
    # A cast or copy of a complete input would exceed it
    assert 0 < peak <= bound
    assert 4 * bound < N * (R + C) * 4


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize(
    ("words", "settings"), [(1, {}), (64, {}), (64, {"padding_idx": 3}), (64, {"by_frequency": True})], ids=str
)
def test_transient_memory_of_an_embedding(words, settings, density, granularity, dtype):
    rows, C, bound = 64, 320, MIB // 2
    pattern = Pattern(draw(rows, C, density, granularity), rows, C, granularity)
    ids, grad = torch.randint(words, (5000,)), torch.randn(5000, C).to(dtype)
    peak = peak_of_transient(lambda: embedding_product(ids, grad, pattern, bound, **settings))
    assert bound // 8 < peak <= bound
    assert 2 * bound < grad.numel() * grad.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("N", [0, 1, 200])
def test_embedding_equals_the_dense_gradient_gathered(N, granularity, dtype):
    R, C = 24, 10
    strip_indices = draw(R, C, 0.3, granularity)
    ids, grad = torch.randint(R, (N,)), torch.randn(N, C).to(dtype)
    for settings in ({}, {"padding_idx": 5}, {"by_frequency": True}, {"padding_idx": 0, "by_frequency": True}):
        factor = torch.ones(N, dtype=torch.float64)
        if settings.get("by_frequency"):
            factor = 1 / (ids[:, None] == ids).sum(1).double()
        factor[ids == settings.get("padding_idx", -1)] = 0
        dense = torch.zeros(R, C, dtype=torch.float64).index_add_(0, ids, grad.double() * factor[:, None])
        expected = dense.flatten()[places(strip_indices, R, C, granularity)]
        for bound in (64 * MIB, 2000, 1):
            pattern = Pattern(strip_indices, R, C, granularity)
            result = embedding_product(ids, grad, pattern, bound, **settings)
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", [1, 4])
def test_an_empty_batch_gives_zeros(granularity):
    for dtype in (torch.float32, torch.bfloat16):
        pattern = Pattern(draw(8, 8, 0.2, granularity), 8, 8, granularity)
        result = sampled_product(*operands(0, 8, 8, dtype), pattern)
        assert torch.equal(result, torch.zeros(pattern.count))


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("density", [0.03, 0.9])
@pytest.mark.parametrize("method", ["sampled", "dense"])
def test_gradcheck(monkeypatch, method, granularity, density):
    """Compared with finite differences, for a linear layer with some trainable scalars."""
    monkeypatch.setattr(sampled, "cheaper_method", lambda *_: method)
    R, C = 8, 12
    pattern = Pattern(draw(R, C, density, granularity), R, C, granularity)
    flat, frozen = torch.cat([*pattern.flat_chunks()]), torch.randn(R, C, dtype=torch.float64)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, delta):
            weight = frozen.flatten().index_add(0, flat, delta).view(R, C)
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, sampled_product(grad, x, pattern)

    inputs = (torch.randn(5, C, dtype=torch.float64), torch.randn(pattern.count, dtype=torch.float64))
    assert torch.autograd.gradcheck(Linear.apply, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize(("R", "C"), [(4, 1), (4, 9), (12, 1), (12, 31)])
@pytest.mark.parametrize("density", [1e-9, 0.3, 1.0])
@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_a_pattern_returns_its_positions(R, C, density, granularity):
    strip_indices = draw(R, C, density, granularity)
    pattern = Pattern(strip_indices, R, C, granularity)
    mask = torch.zeros(R // granularity, C)
    mask.view(-1)[strip_indices] = 1
    expected = mask.to_sparse_csr()
    assert pattern.block_starts.dtype == pattern.strip_columns.dtype == torch.int32
    assert pattern.block_starts.tolist() == expected.crow_indices().tolist()
    assert pattern.strip_columns.tolist() == expected.col_indices().tolist()
    flat = places(strip_indices, R, C, granularity)
    assert torch.equal(torch.cat([*pattern.flat_chunks()]), flat)
    for start, stop in [(0, 1), (flat.numel() // 3, flat.numel()), (flat.numel() // 2, flat.numel() // 2 + 1)]:
        assert torch.equal(pattern.flat_positions(slice(start, stop)), flat[start:stop])


def test_a_pattern_is_computed_in_chunks(monkeypatch):
    strip_indices = draw(12, 31, 0.5, 2)
    whole = Pattern(strip_indices, 12, 31, 2)
    flat = torch.cat([*whole.flat_chunks()])
    monkeypatch.setattr("sparse_zero.gradient.pattern.SHARED_CHUNK", 7)
    cut = Pattern(strip_indices, 12, 31, 2)
    assert all(torch.equal(a, b) for a, b in zip(cut.by_blocks[:2], whole.by_blocks[:2], strict=True))
    assert len([*cut.flat_chunks()]) > 20
    assert torch.equal(torch.cat([*cut.flat_chunks()]), flat)


def test_an_accelerators_block_starts_are_cached_as_long_as_the_strip_indices(monkeypatch):
    monkeypatch.setattr(pattern_module, "has_kernels", lambda tensor: True)
    monkeypatch.setattr(pattern_module.cpu, "loaded_operators", lambda tensor: None)
    searched, search = [], torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a, **k: searched.append(a) or search(*a, **k))
    strip_indices, before = draw(12, 31, 0.5, 2), len(pattern_module._BLOCK_STARTS)
    starts = Pattern(strip_indices, 12, 31, 2).block_starts
    assert Pattern(strip_indices, 12, 31, 2).block_starts is starts
    assert len(searched) == 1
    # The same strip indices in another grid
    assert Pattern(strip_indices, 62, 6).block_starts.numel() == 63
    assert len(searched) == 2
    assert len(pattern_module._BLOCK_STARTS) == before + 1
    searched.clear()
    del strip_indices
    gc.collect()
    assert len(pattern_module._BLOCK_STARTS) == before


def test_chunks_of_a_dense_product_are_aligned_for_tensor_cores(monkeypatch):
    rows, columns = operands(5, 1000, 16)
    strip_indices, seen = draw(1000, 16, 0.1), []
    make_gather = sampled._make_gather
    monkeypatch.setattr(sampled, "_make_gather", lambda p, chunks, b: seen.extend(chunks) or make_gather(p, chunks, b))
    assert_product("dense", rows, columns, strip_indices, transient_bytes=2 * 4 * 16 * 300)
    assert [chunk.start for chunk in seen] == [0, 256, 512, 768]
    seen.clear()
    assert_product("dense", rows, columns, draw(1000, 16, 0.1, 5), 5, transient_bytes=2 * 4 * 16 * 700)
    assert [chunk.start for chunk in seen] == [0, 640]


def test_a_pattern_has_the_positions_of_a_selection():
    count = 33 * 8
    flat = stratified_strips(3, "w", (64, 50), count, 8)
    strip_indices = torch.unique(flat // 50 // 8 * 50 + flat % 50)
    assert torch.equal(torch.cat([*Pattern(strip_indices, 64, 50, 8).flat_chunks()]), flat)


def test_few_positions_are_sampled_and_many_use_the_dense_product():
    N, size = 1024, 2048
    assert cheaper_method(N, size, size, size * size // 100) == "sampled"
    assert cheaper_method(N, size, size, size * size // 2) == "dense"
    # The transposition is too expensive for a small weight
    assert cheaper_method(N, 32, 32, 10) == "dense"
