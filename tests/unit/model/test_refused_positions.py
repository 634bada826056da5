"""Positions and deltas that do not fit are refused before anything is written: the weights keep their bits, and no
memory is read or written that is not the weight's."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from sparse_zero import SparseConfig, sparsify
from sparse_zero.errors import UserError
from sparse_zero.gradient import cpu
from sparse_zero.model.sparsify import apply_selection
from sparse_zero.model.weight import SparseWeight
from sparse_zero.selection.checks import checked_chunks
from sparse_zero.selection.draws import BERNOULLI, STRATIFIED
from sparse_zero.selection.rules import STORED, Selection

CONFIG = SparseConfig(density=0.1, targets="all-linear")
FRESH = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from sparse_zero.quantized.quiet_imports import silence_imports
    silence_imports()
    from sparse_zero import SparseConfig
    from sparse_zero.errors import UserError
    from sparse_zero.gradient import cpu
    from sparse_zero.model.sparsify import apply_selection
    from sparse_zero.selection.draws import BERNOULLI
    from sparse_zero.selection.rules import Selection

    if sys.argv[1] == "operators":
        assert cpu.load_operator() is not None
    # Memory with garbage, for buffers that nobody fills
    sizes = (100, 1000, 5000, 20_000, 100_000) * 20
    garbage = [torch.full((size,), 0x7EADBEEF7EADBEEF) for size in sizes]
    del garbage
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    selections = [
        Selection(BERNOULLI, "0.weight", (200, 300), 6_100, 3, probability=0.1),
        Selection(BERNOULLI, "1.weight", (300, 200), 20_000, 3, probability=0.1),
    ]
    deltas = {selection.name: torch.ones(selection.count) for selection in selections}

    def chunks(selection, device):
        yield from selection.chunks(device)
        raise UserError("the positions have another checksum")

    try:
        apply_selection(model, SparseConfig(density=0.1), selections, [], chunks, deltas=deltas)
    except UserError:
        pass
    else:
        sys.exit("not refused")
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert type(model[0]) is nn.Linear and "_sparse_zero_contents" not in vars(model)
""")


@pytest.mark.parametrize(("way", "processes"), [("torch", 2), ("operators", 1)])
def test_a_refused_adapter_leaves_the_weights_in_fresh_processes(way, processes):
    """The first attack left other weights in half of the processes, and killed all that had the operator."""
    assert cpu.load_operator() is not None  # compiled once
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-c", FRESH, way], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Sequential, before: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in model.parameters())


HOSTILE = {
    "negative": torch.tensor([-1, 4]),
    "too large": torch.tensor([1, 96]),
    "far too large": torch.tensor([1, 2**62]),
    "unsorted": torch.tensor([4, 1]),
    "unsorted inside": torch.tensor([0, 95, 50, 60]),
    "duplicates": torch.tensor([4, 4]),
    "floats": torch.tensor([1.0, 4.0]),
    "booleans": torch.tensor([True, False]),
    "complex": torch.tensor([1j, 2j]),
    "a matrix": torch.tensor([[1, 4]]),
    "a scalar": torch.tensor(1),
    "none": torch.tensor([], dtype=torch.int64),
    "a list": [1, 4],
}


@pytest.mark.parametrize("positions", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_positions_are_refused(positions):
    model = plain()
    before = bits(model)
    with pytest.raises(UserError, match=r"positions: '1\.weight'"):
        sparsify(model, CONFIG, {"0.weight": torch.tensor([1, 2]), "1.weight": positions})
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_positions_of_other_integers_are_taken(dtype):
    model = sparsify(plain(), CONFIG, {"0.weight": torch.tensor([1, 95], dtype=dtype)})
    assert model.sparsity.weights["0.weight"].flat_positions().tolist() == [1, 95]


CHUNKS = {
    **{name: [flat] for name, flat in HOSTILE.items() if name not in ("a list", "none")},
    "no chunk": [],
    "too few": [torch.tensor([3])],
    "too many": [torch.tensor([3]), torch.tensor([5, 6])],
    "unsorted chunks": [torch.tensor([5]), torch.tensor([3])],
    "equal over chunks": [torch.tensor([5]), torch.tensor([5])],
    "int32": [torch.tensor([5, 7], dtype=torch.int32)],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_hostile_chunks_are_refused_before_anything_is_written(chunks):
    """The other weight, with good positions, is not written either."""
    model = plain()
    before = bits(model)
    selections = [Selection(STRATIFIED, "0.weight", (8, 12), 5), Selection(STORED, "1.weight", (12, 8), 2)]

    def positions(selection: Selection, device: torch.device) -> list[torch.Tensor]:
        return chunks if selection.name == "1.weight" else selection.chunks(device)

    deltas = {"0.weight": torch.ones(5), "1.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"1\.weight: "):
        apply_selection(model, CONFIG, selections, [], positions, deltas=deltas)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "deltas", [torch.ones(4), torch.ones(1, 5), torch.ones(5).int(), torch.ones(5).bool(), torch.ones(5) * 1j]
)
def test_hostile_deltas_are_refused(deltas):
    model = plain()
    before = bits(model)
    selections = [Selection(STRATIFIED, "0.weight", (8, 12), 5)]
    with pytest.raises(UserError, match=r"0\.weight: the deltas must be real numbers, \(5,\)"):
        apply_selection(model, CONFIG, selections, [], deltas={"0.weight": deltas})
    assert_unchanged(model, before)


def test_a_selection_of_another_shape_is_refused():
    model = plain()
    before = bits(model)
    with pytest.raises(UserError, match=r"the model has shape \[8, 12\], the selection \[12, 8\]"):
        apply_selection(model, CONFIG, [Selection(STRATIFIED, "0.weight", (12, 8), 5)], [])
    assert_unchanged(model, before)


@pytest.mark.parametrize("indices", ["stored", "regenerated"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_lack_of_memory_while_the_deltas_are_written_leaves_the_weights(monkeypatch, at, indices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 400))
    before = bits(model)
    selections = [Selection(STRATIFIED, f"{i}.weight", tuple(model[i].weight.shape), 90_000) for i in (0, 1)]
    drawn = SparseWeight._flat_chunks
    calls = iter([False] * at + [True])

    def failing(weight: SparseWeight):
        for chunk in drawn(weight):
            if weight.selection.name == "1.weight" and next(calls, False):
                raise MemoryError
            yield chunk

    monkeypatch.setattr(SparseWeight, "_flat_chunks", failing)
    deltas = {selection.name: torch.ones(selection.count) for selection in selections}
    with pytest.raises(MemoryError):
        apply_selection(model, SparseConfig(density=0.1, indices=indices), selections, [], deltas=deltas)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"rule": "columns-v9"}, "no rule 'columns-v9'"),
        ({"count": 97}, "97 of 96 scalars"),
        ({"count": -1}, "-1 of 96 scalars"),
        ({"shape": (10**10, 10**10)}, "scalars"),
        ({"shape": (-8, -12)}, "scalars"),
        ({"granularity": 0}, "granularity 0"),
        ({"granularity": -1}, "granularity -1"),
        ({"granularity": 5, "count": 10}, "granularity 5"),
        ({"granularity": 4, "count": 6}, "granularity 4"),
        ({"granularity": 4, "count": 8, "rule": STORED}, "granularity 4"),
        ({"whole_rows": (3, 1), "count": 40}, "whole rows"),
        ({"whole_rows": (8,), "count": 40}, "whole rows"),
        ({"whole_rows": (-1,), "count": 40}, "whole rows"),
        ({"whole_rows": (1, 2), "count": 10}, "10 scalars in 2 whole rows"),
        ({"rule": BERNOULLI}, "probability None"),
        ({"rule": BERNOULLI, "probability": float("nan")}, "probability nan"),
        ({"rule": BERNOULLI, "probability": 2.0}, "probability 2.0"),
        ({"shape": (2**20, 2**20), "count": 2**31}, "more than the rule"),
    ],
)
def test_a_selection_that_no_weight_can_have(selection, words):
    known = {"rule": STRATIFIED, "name": "w", "shape": (8, 12), "count": 8}
    with pytest.raises(UserError, match=words):
        Selection(**known | selection)


@pytest.mark.parametrize("count", [1, 20_000])
def test_a_probability_that_selects_another_number(count):
    selection = Selection(BERNOULLI, "w", (300, 200), count, probability=0.1)
    for draw in (selection.positions, lambda: [*selection.chunks()], lambda: [*selection.strip_chunks()]):
        with pytest.raises(UserError, match=f"w: its probability 0.1 selects (more|less) than {count} scalars"):
            draw()


def test_checked_chunks_are_the_chunks():
    selection = Selection(STORED, "w", (8, 12), 4)
    chunks = [torch.tensor([0, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([4, 95])]
    assert [chunk.tolist() for chunk in checked_chunks(selection, chunks)] == [[0, 3], [], [4, 95]]


def test_an_adapter_is_still_applied():
    """The check above could refuse everything."""
    model, before = plain(), copy.deepcopy(plain())
    selection = Selection(STRATIFIED, "0.weight", (8, 12), 5)
    apply_selection(model, CONFIG, [selection], [], deltas={"0.weight": torch.ones(5)})
    expected = before[0].weight.detach().clone()
    expected.view(-1)[selection.positions()] += 1
    assert torch.equal(model[0]._parameters["weight"], expected)
