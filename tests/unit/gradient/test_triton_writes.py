"""The kernels that write deltas compared with torch, on a GPU if there is one, else in Triton's interpreter."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from sparse_zero import SparseConfig, refresh, sparsify
from sparse_zero.gradient import cpu
from sparse_zero.gradient.pattern import InnerScalars, Pattern
from sparse_zero.model import weight_values, writes

if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

from triton_cases import BAD_STRIPS, DEVICE, bad_strips, inside, interpret

from sparse_zero.gradient import triton_writes

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    torch.manual_seed(0)
    interpret(monkeypatch, triton_writes)


@pytest.mark.parametrize("granularity", [1, 3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_deltas_are_written_with_torchs_bits(dtype, index_dtype, granularity):
    R, C = 96, 20
    for count in (1, 90):
        strip_indices = torch.randperm(R // granularity * C)[:count].sort().values.to(DEVICE, index_dtype)
        flat = torch.cat([*Pattern(strip_indices, R, C, granularity).flat_chunks()])
        matrix, base, delta = (torch.randn(x).to(DEVICE) for x in (R * C, flat.numel(), flat.numel()))
        matrix, base = matrix.to(dtype), base.to(dtype)
        for change in (delta, delta.to(dtype), None):
            written, expected = matrix.clone(), matrix.clone()
            expected[flat] = base if change is None else (base.float() + change).to(dtype)
            version = written._version
            triton_writes.write_deltas(written, base, change, Pattern(strip_indices, R, C, granularity))
            assert torch.equal(written, expected)
            assert not torch.equal(written, matrix)
            # Autograd detects the change in graphs that have saved the weight
            assert written._version > version


@pytest.mark.parametrize("indices", ["stored", "regenerated"])
@pytest.mark.parametrize("settings", [{}, {"granularity": 8}, {"columns": 0.5}], ids=["single", "strips", "columns"])
def test_a_weight_is_written_by_the_kernel_and_its_positions_are_drawn_once(monkeypatch, settings, indices):
    monkeypatch.setattr(weight_values, "has_kernels", lambda tensor: True)
    monkeypatch.setattr(weight_values.cpu, "loaded_operators", lambda tensor: None)
    config = SparseConfig(density=0.2, targets="all-linear", indices=indices, **settings)
    model = sparsify(torch.nn.Sequential(torch.nn.Linear(20, 16)).to(DEVICE), config)
    (weight,) = model.sparsity.weights.values()
    weight.delta.data.normal_()
    expected = weight.weight.detach().clone().view(-1)
    expected[weight.flat_positions()] += weight.delta.detach()
    drawn, draw_strips, written, write = [], type(weight)._draw_strips, [], triton_writes.write_deltas
    monkeypatch.setattr(type(weight), "_draw_strips", lambda *a: drawn.append(a) or draw_strips(*a))
    monkeypatch.setattr(triton_writes, "write_deltas", lambda *a: written.append(a) or write(*a))
    weight.write()
    assert torch.equal(weight.weight.detach().view(-1), expected)
    assert len(written) == 1
    # Regenerated single positions are drawn in chunks
    assert len(drawn) == (indices == "regenerated" and "granularity" in settings)


def test_nothing_is_written_without_positions():
    matrix, nowhere = torch.zeros(100, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    triton_writes.write_deltas(matrix, nowhere.float(), None, Pattern(nowhere, 5, 20))
    assert not matrix.any()


def test_arguments_that_do_not_fit_are_refused():
    pattern = Pattern(torch.tensor([3, 7], device=DEVICE), 16, 20)
    for matrix, base, change in ((320, 1, 2), (320, 2, 1), (319, 2, 2)):
        sizes = [torch.zeros(size, device=DEVICE) for size in (matrix, base, change)]
        with pytest.raises(AssertionError):
            triton_writes.write_deltas(*sizes, pattern)
        with pytest.raises(AssertionError):
            triton_writes.write_all_deltas(*([each] for each in sizes), [pattern])


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("name", BAD_STRIPS)
def test_no_kernel_leaves_its_tensors(monkeypatch, name, granularity):
    """Strip indices that do not fit are left out. They are refused before, by checks.checked_chunks."""
    monkeypatch.setattr(cpu, "loaded_operators", lambda tensor: None)
    R, C, g = 64, 20, granularity
    end = R // g * C
    indices = bad_strips(name, end)
    pattern, base = Pattern(indices, R, C, g), torch.ones(indices.numel() * g, device=DEVICE)
    strips = indices.tolist()
    valid = {
        row * C + strip % C
        for strip in strips
        if 0 <= strip < end
        for row in range(strip // C * g, strip // C * g + g)
    }
    for together in (False, True):
        matrix, around = inside(R * C)
        if together:
            triton_writes.write_all_deltas([matrix], [base], [base], [pattern])
        else:
            triton_writes.write_deltas(matrix, base, base, pattern)
        assert (around == -1).sum() == around.numel() - R * C
        assert {*matrix.nonzero().flatten().tolist()} <= valid
        if name != "unsorted" and g == 1:
            assert {*matrix.nonzero().flatten().tolist()} == valid


def test_a_strip_index_above_32_bits_is_written():
    columns = 2**16
    matrix = torch.empty(2**15 + 1, columns, dtype=torch.bfloat16, device=DEVICE).view(-1)
    strip_indices = torch.tensor([2**31 - 1, 2**31, 2**31 + 5], device=DEVICE)
    base, change = torch.ones(3, dtype=torch.bfloat16, device=DEVICE), torch.arange(3.0, device=DEVICE)
    triton_writes.write_deltas(matrix, base, change, Pattern(strip_indices, 2**15 + 1, columns))
    assert matrix[strip_indices].tolist() == [1, 2, 3]


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_matrices_are_written_in_one_launch_with_the_bits_of_single_ones(dtype, index_dtype, granularity):
    shapes = ((96, 20, 90), (16, 7, 1), (8, 64, 33), (160, 50, 800))
    patterns = [
        Pattern(torch.randperm(R // granularity * C)[:count].sort().values.to(DEVICE, index_dtype), R, C, granularity)
        for R, C, count in shapes
        if count <= R // granularity * C
    ]
    before = [torch.randn(pattern.rows, pattern.columns).to(DEVICE, dtype) for pattern in patterns]
    bases = [torch.randn(pattern.count).to(DEVICE, dtype) for pattern in patterns]
    deltas = [torch.randn(pattern.count).to(DEVICE) for pattern in patterns]
    for changes in (deltas, [delta.to(dtype) for delta in deltas], []):
        expected, written = [matrix.clone() for matrix in before], [matrix.clone() for matrix in before]
        versions = [matrix._version for matrix in written]
        for i, pattern in enumerate(patterns):
            triton_writes.write_deltas(expected[i].view(-1), bases[i], changes[i] if changes else None, pattern)
        with counted_launches() as launched:
            triton_writes.write_all_deltas(written, bases, changes, patterns)
        assert len(launched) == 1
        for i, matrix in enumerate(written):
            assert torch.equal(matrix, expected[i])
            assert not torch.equal(matrix, before[i])
            assert matrix._version > versions[i]


@contextlib.contextmanager
def counted_launches() -> Iterator[list]:
    """The grids of the launches in a block."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in vars(triton_writes).copy().items():
            if name.endswith("_kernel"):
                patch.setattr(triton_writes, name, _Noting(kernel, launched))
        yield launched


class _Noting:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launched: list):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


def inner_scalars(weight: torch.Tensor, axis: int, drawn: torch.Tensor, indices: torch.Tensor | None) -> InnerScalars:
    padded = torch.cat([drawn, drawn[-1:].expand(3)])
    return InnerScalars(indices, padded, drawn.numel(), weight.shape[axis], 1 if axis == -1 else weight.shape[-1])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_columns_of_many_weights_are_written_in_one_launch_with_torchs_bits(dtype, index_dtype):
    """Of linear layers, of Conv1D and of experts in both layouts. None: all scalars of the columns."""
    layouts = (((33, 20), -1), ((20, 33), -2), ((3, 8, 20), -1), ((3, 20, 8), -2), ((1, 1), -1), ((70, 90), -1))
    before, bases, deltas, scalars, places = [], [], [], [], []
    for shape, axis in layouts:
        weight = torch.randn(shape).to(DEVICE, dtype)
        drawn = torch.randperm(shape[axis])[: -(-shape[axis] // 3)].sort().values.to(DEVICE)
        inner = torch.arange(weight.numel(), device=DEVICE).view(shape).index_select(axis, drawn).flatten()
        some = torch.randperm(inner.numel())[: -(-inner.numel() // 2)].sort().values.to(DEVICE)
        places.append(inner if index_dtype is None else inner[some])
        scalars.append(inner_scalars(weight, axis, drawn, None if index_dtype is None else some.to(index_dtype)))
        before.append(weight)
        bases.append(torch.randn(places[-1].numel()).to(DEVICE, dtype))
        deltas.append(torch.randn(places[-1].numel()).to(DEVICE))
    for changes in (deltas, [delta.to(dtype) for delta in deltas], []):
        written = [weight.clone() for weight in before]
        with counted_launches() as launched:
            triton_writes.write_all_columns(written, bases, changes, scalars)
        assert len(launched) == 1
        for i, weight in enumerate(written):
            expected = before[i].clone().view(-1)
            expected[places[i]] = (bases[i].float() + changes[i]).to(dtype) if changes else bases[i]
            assert torch.equal(weight, expected.view_as(weight))
            assert not torch.equal(weight, before[i])
            assert weight._version > 0


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", [*BAD_STRIPS, "columns"])
def test_no_write_of_columns_leaves_the_weight(name, axis):
    shape = (64, 20) if axis == -1 else (20, 64)
    weight, around = inside(64 * 20)
    drawn = torch.tensor([-1, 3, 20] if name == "columns" else [0, 3, 19], device=DEVICE)
    indices = torch.arange(3 * 64, device=DEVICE) if name == "columns" else bad_strips(name, 3 * 64)
    base = torch.ones(indices.numel(), device=DEVICE)
    triton_writes.write_all_columns([weight], [base], [], [inner_scalars(weight.view(shape), axis, drawn, indices)])
    assert (around == -1).sum() == around.numel() - weight.numel()
    inner = torch.arange(64 * 20).view(shape).index_select(axis, drawn.cpu().clamp(0, 19)).flatten()
    valid = {int(inner[i]) for i in indices.tolist() if 0 <= i < inner.numel()}
    if name == "columns":
        valid = {*torch.arange(64 * 20).view(shape).select(axis, 3).tolist()}
    assert {*weight.nonzero().flatten().tolist()} == valid


def test_columns_that_do_not_fit_are_refused():
    weight, drawn = torch.zeros(16, 20, device=DEVICE), torch.tensor([3, 7], device=DEVICE)
    fitting = inner_scalars(weight, -1, drawn, None)
    for sizes, scalars in (
        ((31, 32), fitting),
        ((32, 31), fitting),
        ((32, 32), fitting._replace(width=19)),
        ((32, 32), fitting._replace(count=6)),
        ((32, 32), fitting._replace(count=1)),
    ):
        base, change = (torch.zeros(size, device=DEVICE) for size in sizes)
        with pytest.raises(AssertionError):
            triton_writes.write_all_columns([weight], [base], [change], [scalars])


def test_a_column_above_32_bits_is_written():
    width = 2**16
    weight = torch.empty(2**15 + 1, width, dtype=torch.bfloat16, device=DEVICE)
    scalars = InnerScalars(
        torch.tensor([2**15 * 3 - 1, 2**15 * 3, 2**15 * 3 + 2], device=DEVICE),
        torch.tensor([2, 7, width - 1], device=DEVICE),
        *(3, width, 1),
    )
    base, change = torch.ones(3, dtype=torch.bfloat16, device=DEVICE), torch.arange(3.0, device=DEVICE)
    triton_writes.write_all_columns([weight], [base], [change], [scalars])
    assert [weight[2**15 - 1, -1], weight[2**15, 2], weight[2**15, -1]] == [1, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": 8}, {"columns": 0.5}, {"columns": "whole"}, {"columns": "whole", "indices": "regenerated"}],
    ids=str,
)
def test_a_model_is_written_by_one_launch_for_each_dtype(monkeypatch, settings):
    for module in (weight_values, writes):
        monkeypatch.setattr(module.cpu, "loaded_operators", lambda tensor: None)
    monkeypatch.setattr(weight_values, "has_kernels", lambda tensor: True)
    layers = [torch.nn.Linear(20, 16), torch.nn.Linear(16, 24), torch.nn.Linear(24, 8).double().bfloat16()]
    config = SparseConfig(density=0.2, targets="all-linear", **settings)
    model = sparsify(torch.nn.Sequential(*layers).to(DEVICE), config)
    expected = {}
    for name, weight in model.sparsity.weights.items():
        weight.delta.data.normal_()
        matrix = weight.weight.detach().clone().view(-1)
        matrix[weight.flat_positions()] = (matrix[weight.flat_positions()].float() + weight.delta.detach()).to(
            matrix.dtype
        )
        expected[name] = matrix.view_as(weight.weight)
    name = "write_all_columns" if "columns" in settings else "write_all_deltas"
    calls, write_all = [], getattr(triton_writes, name)
    monkeypatch.setattr(triton_writes, name, lambda *a: calls.append(len(a[0])) or write_all(*a))
    refresh(model)
    assert sorted(calls) == [1, 2]
    for name, weight in model.sparsity.weights.items():
        assert torch.equal(weight.weight, expected[name])
    refresh(model)
    if DEVICE == "cpu":  # on a GPU, deltas are written again rather than compared
        assert sorted(calls) == [1, 2]
