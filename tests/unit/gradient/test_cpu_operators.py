"""The C++ operators other than the gradient give the same bits as torch, which is used if they are not loaded."""

import copy

import pytest
import torch
from torch import nn

from sparse_zero import SparseConfig, refresh, sparsify
from sparse_zero.gradient import cpu
from sparse_zero.gradient.pattern import Pattern


@pytest.fixture(params=["torch", "operators"])
def path(request, monkeypatch) -> str:
    """Which implementation is used in the test."""
    if request.param == "operators":
        assert operators() is not None
    else:
        monkeypatch.setattr(cpu, "loaded_operators", lambda _: None)
    return request.param


@pytest.fixture(autouse=True)
def threads():
    """Enough threads to divide the larger weights, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def operators():
    assert cpu.load_operator() is not None
    return cpu.loaded_operators(torch.empty(0))


def draw(count: int, of: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randperm(of, generator=torch.Generator().manual_seed(0))[:count].sort().values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "apart"])
@pytest.mark.parametrize(
    ("rows", "columns", "granularity", "count"),
    [(6, 5, 1, 11), (6, 5, 1, 30), (6, 5, 3, 1), (6, 5, 1, 0), (1, 300_000, 1, 90_000), (90_000, 3, 2, 60_000)],
)
def test_a_pattern_of_strip_indices(path, rows, columns, granularity, count, dtype, apart):
    blocks = rows // granularity
    strip_indices = draw(count, blocks * columns, dtype)
    given = strip_indices.repeat_interleave(2)[::2] if apart else strip_indices
    pattern = Pattern(given, rows, columns, granularity)
    inside = torch.bincount(strip_indices // columns, minlength=blocks)
    assert pattern.block_starts.tolist() == [0, *inside.cumsum(0).tolist()]
    assert torch.equal(pattern.strip_columns.long(), strip_indices.long() % columns)
    assert pattern.block_starts.dtype == pattern.strip_columns.dtype == torch.int32


def test_strip_indices_above_two_billion(path):
    """blocks * columns exceeds int32."""
    rows, columns = 2**17, 2**15
    strip_indices = torch.tensor([0, 2**31 - 1, 2**31, rows * columns - 1])
    pattern = Pattern(strip_indices, rows, columns)
    assert pattern.strip_columns.tolist() == [0, columns - 1, 0, columns - 1]
    assert pattern.block_starts[[0, 1, 2**16 - 1, 2**16, 2**16 + 1, rows - 1, rows]].tolist() == [0, 1, 1, 2, 3, 3, 4]


class Layers(nn.Module):
    """The last one is divided among threads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(24, 96), nn.Linear(96, 512)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


KINDS = [{}, {"granularity": 4}, {"selection": "bernoulli"}, {"trainable_token_indices": [3, 7]}, {"dropout": 0.5}]


@pytest.mark.parametrize("indices", ["stored", "regenerated"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_is_the_original_plus_the_delta(path, dtype, settings, indices):
    """Compared with an explicit sum."""
    torch.manual_seed(0)
    plain = Layers().to(dtype)
    model = sparsify(
        copy.deepcopy(plain), SparseConfig(density=0.3, targets="all", seed=5, indices=indices, **settings)
    )
    weights = model.sparsity.weights
    assert len(weights) == 3  # the bias, too
    for change_dtype in {torch.float32, dtype}:
        for name, weight in weights.items():
            weight.delta.data = torch.randn(weight.delta.shape).to(change_dtype)
            expected = plain.get_parameter(name).detach().clone().view(-1)
            flat = weight.flat_positions()
            setting = weight.at_rest._replace(dropout_step=3 if "dropout" in settings else None)
            factor = weight.factor(setting) if "dropout" in settings else 1
            wide = torch.promote_types(dtype, torch.float32)
            expected[flat] = (expected[flat].to(wide) + weight.delta.detach() * factor).to(dtype)
            version = weight.weight._version
            weight.write(setting)
            assert torch.equal(weight.weight.detach().view(-1), expected)
            assert not torch.equal(weight.weight, plain.get_parameter(name))
            # Autograd detects the change in graphs that have saved the weight
            assert weight.weight._version > version
            weight.enabled = False
            weight.write()
            assert torch.equal(weight.weight, plain.get_parameter(name))
            weight.enabled = True


WEIGHT, STRIP_INDICES = torch.zeros(24), torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((WEIGHT, torch.zeros(2), torch.zeros(2), torch.tensor([1, 24]), 6, 1), "outside of the weight"),
        ((WEIGHT, torch.zeros(2), torch.zeros(2), torch.tensor([-1, 4]), 6, 1), "outside of the weight"),
        ((WEIGHT, torch.zeros(4), torch.zeros(4), torch.tensor([1, 12]), 6, 2), "outside of the weight"),
        ((WEIGHT, torch.zeros(3), None, torch.tensor([1, 99, 4]), 6, 1), "strictly increasing"),
        ((WEIGHT, torch.zeros(3), None, torch.tensor([1, -9, 4]), 6, 1), "strictly increasing"),
        ((WEIGHT, torch.zeros(2), None, torch.tensor([4, 4]), 6, 1), "strictly increasing"),
        ((WEIGHT, torch.zeros(6), None, torch.tensor([1, 99, 4]), 6, 2), "strictly increasing"),
        ((WEIGHT, torch.zeros(2), None, torch.tensor([4, 1], dtype=torch.int32), 6, 1), "strictly increasing"),
        ((WEIGHT, torch.zeros(2), None, torch.tensor([True, False]), 6, 1), "Bool"),
        ((WEIGHT, torch.zeros(2), None, STRIP_INDICES.short(), 6, 1), "Short"),
        ((WEIGHT, torch.zeros(2), None, torch.tensor([[1, 4]]), 6, 1), "one dimension"),
        ((WEIGHT, torch.zeros(50), None, torch.arange(50), 6, 1), "more strips"),
        ((WEIGHT, torch.zeros(2), None, STRIP_INDICES, 2**62, 4), "complete blocks"),
        ((WEIGHT, torch.zeros(2), None, STRIP_INDICES, 4, 2**62), "complete blocks"),
        ((WEIGHT, torch.zeros(2), None, STRIP_INDICES, -6, -1), "complete blocks"),
        ((WEIGHT, torch.zeros(3), torch.zeros(2), STRIP_INDICES, 6, 1), "base does not fit"),
        ((WEIGHT, torch.zeros(2).double(), torch.zeros(2), STRIP_INDICES, 6, 1), "base does not fit"),
        ((WEIGHT, torch.zeros(2), torch.zeros(3), STRIP_INDICES, 6, 1), "change does not fit"),
        ((WEIGHT, torch.zeros(2), torch.zeros(4)[::2], STRIP_INDICES, 6, 1), "change does not fit"),
        ((WEIGHT, torch.zeros(2), torch.zeros(2).double(), STRIP_INDICES, 6, 1), "Float"),
        ((WEIGHT, torch.zeros(2), None, STRIP_INDICES.float(), 6, 1), "Float"),
        ((WEIGHT, torch.zeros(4), None, torch.arange(8)[::4], 6, 2), "contiguous"),
        ((WEIGHT[::2], torch.zeros(2), None, STRIP_INDICES, 6, 1), "contiguous"),
        ((WEIGHT, torch.zeros(10), None, STRIP_INDICES, 6, 5), "complete blocks"),
        ((WEIGHT, torch.zeros(0), None, STRIP_INDICES, 6, 0), "complete blocks"),
    ],
)
def test_nothing_is_written_if_the_arguments_do_not_fit(arguments, words):
    with pytest.raises(RuntimeError, match=words):
        operators().write_deltas(*arguments)
    assert not WEIGHT.any()


@pytest.mark.parametrize("settings", [{}, {"granularity": 4}, {"columns": 0.5}, {"columns": "whole"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_weights_of_a_dtype_are_written_in_one_call(path, dtype, settings):
    """Compared with an explicit sum, and with the calls that torch's profiler counts."""
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Linear(16, 8).to(dtype), nn.Linear(8, 24).to(dtype), nn.Linear(24, 32).to(dtype)])
    model = sparsify(copy.deepcopy(plain), SparseConfig(density=0.3, targets="all-linear", **settings))
    for weight in model.sparsity.weights.values():
        weight.delta.data.normal_()
    versions = [weight.weight._version for weight in model.sparsity.weights.values()]
    with torch.profiler.profile() as profiler:
        refresh(model)
    calls = [event.name for event in profiler.events() if event.name.startswith("sparse_zero::write")]
    name = f"sparse_zero::write_all_{'columns' if 'columns' in settings else 'deltas'}"
    assert calls == ([name] if path == "operators" else [])
    for (name, weight), version in zip(model.sparsity.weights.items(), versions, strict=True):
        flat, wide = weight.flat_positions(), torch.promote_types(dtype, torch.float32)
        expected = plain.get_parameter(name).detach().clone().view(-1)
        expected[flat] = (expected[flat].to(wide) + weight.delta.detach()).to(dtype)
        assert torch.equal(weight.weight.detach().view(-1), expected)
        assert weight.weight._version > version


LAYOUTS = [((300, 90), -1), ((90, 300), -2), ((4, 30, 60), -1), ((4, 60, 30), -2), ((1, 1), -1), ((7, 1), -2)]


@pytest.mark.parametrize("share", [1, 0.6, 1e-9], ids=["all", "most", "one"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_scalars_in_drawn_columns_are_written_with_torchs_bits(dtype, index_dtype, share):
    """Of linear layers, of Conv1D and of experts in both layouts; the columns are followed by others."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    weights, bases, deltas, indices, columns, expected = [], [], [], [], [], []
    counts = [-(-shape[axis] // 2) for shape, axis in LAYOUTS]
    for (shape, axis), count in zip(LAYOUTS, counts, strict=True):
        weights.append(torch.randn(shape).to(dtype))
        drawn = draw(count, shape[axis])
        columns.append(torch.cat([drawn, drawn[-1:].expand(3)]))
        inner = torch.arange(weights[-1].numel()).view(shape).index_select(axis, drawn).flatten()
        indices.append(draw(max(1, round(share * inner.numel())), inner.numel(), index_dtype))
        places = inner[indices[-1].long()]
        bases.append(torch.randn(places.numel()).to(dtype))
        deltas.append(torch.randn(places.numel()))
        expected.append([weights[-1].flatten().clone() for _ in range(2)])
        expected[-1][0][places] = bases[-1]
        expected[-1][1][places] = (bases[-1].to(wide) + deltas[-1]).to(dtype)
    sizes = [shape[axis] for shape, axis in LAYOUTS], [1 if axis == -1 else shape[-1] for shape, axis in LAYOUTS]
    for changes in ([], deltas):
        for given in (indices, []) if share == 1 else (indices,):  # without indices: all
            written = [weight.clone() for weight in weights]
            operators().write_all_columns(written, bases, changes, given, columns, counts, *sizes)
            for weight, values in zip(written, expected, strict=True):
                assert torch.equal(weight.flatten(), values[bool(changes)])
                assert weight._version > 0


COLUMNS = torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # weight (4, 6), base, change, inner indices, columns, how many of these, width, below
        ((torch.zeros(8), None, None, torch.tensor([1, 6]), 2, 6, 1), "columns outside of the weight"),
        ((torch.zeros(8), None, None, torch.tensor([-1, 5]), 2, 6, 1), "columns outside of the weight"),
        ((torch.zeros(8), None, None, torch.tensor([4, 1]), 2, 6, 1), "strictly increasing"),
        ((torch.zeros(8), None, None, COLUMNS, 3, 6, 1), "as many as are used"),
        ((torch.zeros(8), None, None, COLUMNS, 0, 6, 1), "as many as are used"),
        ((torch.zeros(8), None, None, COLUMNS[:, None], 2, 6, 1), "one dimension"),
        ((torch.zeros(8), None, None, torch.arange(4)[::2], 2, 6, 1), "contiguous"),
        ((torch.zeros(8), None, None, COLUMNS.int(), 2, 6, 1), "Int"),
        ((torch.zeros(2), None, torch.tensor([0, 8]), COLUMNS, 2, 6, 1), "strip indices outside of the weight"),
        ((torch.zeros(2), None, torch.tensor([-1, 3]), COLUMNS, 2, 6, 1), "strip indices outside of the weight"),
        ((torch.zeros(3), None, torch.tensor([0, 99, 3]), COLUMNS, 2, 6, 1), "strictly increasing"),
        ((torch.zeros(2), None, torch.tensor([3, 3]), COLUMNS, 2, 6, 1), "strictly increasing"),
        ((torch.zeros(2), None, torch.tensor([[0, 1]]), COLUMNS, 2, 6, 1), "one dimension"),
        ((torch.zeros(2), None, torch.tensor([0.0, 1.0]), COLUMNS, 2, 6, 1), "Float"),
        ((torch.zeros(9), None, None, COLUMNS, 2, 6, 1), "base does not fit"),
        ((torch.zeros(8).double(), None, None, COLUMNS, 2, 6, 1), "base does not fit"),
        ((torch.zeros(8), torch.zeros(9), None, COLUMNS, 2, 6, 1), "change does not fit"),
        ((torch.zeros(8), torch.zeros(8).double(), None, COLUMNS, 2, 6, 1), "Float"),
        ((torch.zeros(8), None, None, COLUMNS, 2, 7, 1), "complete matrices"),
        ((torch.zeros(8), None, None, COLUMNS, 2, 0, 1), "complete matrices"),
        ((torch.zeros(8), None, None, COLUMNS, 2, 6, 0), "complete matrices"),
        ((torch.zeros(8), None, None, COLUMNS, 2, 2**62, 4), "complete matrices"),
        ((torch.zeros(8), None, None, COLUMNS, 2, 6, 2**62), "complete matrices"),
        ((torch.zeros(8), None, None, COLUMNS, 2, -6, -1), "complete matrices"),
    ],
)
def test_nothing_is_written_if_the_columns_do_not_fit(arguments, words):
    base, change, indices, columns, *sizes = arguments
    lists = [base], [] if change is None else [change], [] if indices is None else [indices], [columns]
    with pytest.raises(RuntimeError, match=words):
        operators().write_all_columns([WEIGHT], *lists, *([size] for size in sizes))
    assert not WEIGHT.any()


def test_lists_of_different_lengths_are_not_written():
    base = [torch.ones(2)]
    with pytest.raises(RuntimeError, match="one entry for each weight"):
        operators().write_all_deltas([WEIGHT, WEIGHT], base, [], [STRIP_INDICES], [6], [1])
    with pytest.raises(RuntimeError, match="base does not fit"):
        operators().write_all_deltas([WEIGHT], [torch.ones(3)], [], [STRIP_INDICES], [6], [1])
    with pytest.raises(RuntimeError, match="one entry for each weight"):
        operators().write_all_columns([WEIGHT], [torch.ones(8)], [], [], [COLUMNS] * 2, [2], [6], [1])
    assert not WEIGHT.any()


@pytest.mark.parametrize(
    "strip_indices",
    [torch.tensor(each) for each in ([1, 12], [-1, 3], [[0, 1], [2, 3]], [3, 1], [3, 3], [0, 99, 5], [0, -99, 5])],
    ids=str,
)
def test_strip_indices_outside_of_the_grid_have_no_pattern(strip_indices):
    with pytest.raises(RuntimeError, match=r"outside|one dimension|strictly increasing"):
        operators().pattern(strip_indices, 3, 4)


@pytest.mark.parametrize(("blocks", "columns"), [(-1, 4), (3, 0), (3, -4), (2**40, 2**40), (3, 2**40)])
def test_grids_that_do_not_exist_have_no_pattern(blocks, columns):
    with pytest.raises(RuntimeError, match="no such grid"):
        operators().pattern(torch.tensor([1]), blocks, columns)


PRODUCT = {
    "rows": torch.ones(5, 4),
    "columns": torch.ones(5, 6),
    "block_starts": torch.tensor([0, 1, 2, 2, 3], dtype=torch.int32),
    "strip_columns": torch.tensor([0, 5, 2], dtype=torch.int32),
    "granularity": 1,
    "tokens": 64,
    "groups": 1,
    "threads": 1,
    "dtype": torch.float32,
}


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        {"strip_columns": int32(0, 6, 2)},
        {"strip_columns": int32(0, -1, 2)},
        {"strip_columns": int32(0, 2**31 - 1, 2)},
        {"strip_columns": int32(0, 5)},
        {"strip_columns": torch.tensor([0, 5, 2])},
        {"strip_columns": torch.tensor([0.0, 5.0, 2.0])},
        {"strip_columns": torch.tensor([[0, 5, 2]], dtype=torch.int32)},
        {"block_starts": int32(0, 1, 9, 2, 3)},
        {"block_starts": int32(0, 1, -9, 2, 3)},
        {"block_starts": int32(1, 1, 2, 2, 3)},
        {"block_starts": int32(0, 1, 2, 3)},
        {"block_starts": int32(0)},
        {"block_starts": int32()},
        {"granularity": 0},
        {"granularity": -1},
        {"granularity": 2},
        {"granularity": 2**62},
        {"rows": torch.ones(4, 4)},
        {"rows": torch.ones(20)},
        {"rows": torch.ones(1, 5, 4)},
        {"rows": torch.ones(5, 4).long()},
        {"columns": torch.ones(1, 1).expand(5, 2**50)},
        {"columns": torch.ones(0, 6), "rows": torch.ones(0, 4)},
        {"tokens": 0},
        {"tokens": 17},
        {"groups": 0},
        {"groups": 2**62},
        {"threads": 0},
        {"threads": 2**62},
        {"dtype": torch.int32},
    ],
    ids=str,
)
def test_arguments_of_a_product_that_do_not_fit_are_refused(change):
    product = operators().sampled_product
    assert product(*PRODUCT.values()).tolist() == [5, 5, 5]
    with pytest.raises(RuntimeError):
        product(*(PRODUCT | change).values())


def test_nothing_is_compiled_to_write_deltas(monkeypatch):
    cpu.load_operator.cache_clear()
    monkeypatch.setattr(cpu, "_load", lambda: pytest.fail("compiled"))
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), SparseConfig(density=0.5, targets="all"))
    model(torch.ones(1, 8)).sum().backward()
    assert cpu.loaded_operators(torch.empty(0)) is None


@pytest.mark.parametrize(
    ("weight_dtype", "delta_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str
)
def test_dtypes_that_the_operator_does_not_support_are_written_by_torch(weight_dtype, delta_dtype):
    assert operators() is not None
    model = sparsify(nn.Sequential(nn.Linear(8, 8)).to(weight_dtype), SparseConfig(density=0.5, targets="all-linear"))
    (weight,) = model.sparsity.weights.values()
    before, flat = weight.weight.detach().clone().flatten(), weight.flat_positions()
    weight.delta.data = torch.randn(weight.delta.shape).to(delta_dtype)
    weight.write()
    expected = (before[flat].double() + weight.delta.detach().double()).to(weight_dtype)
    assert torch.equal(weight.weight.detach().flatten()[flat], expected)
