"""Drawn columns: golden positions, a slow reference, the groups that share them, their number, and the axis."""

import logging
import math

import pytest
import torch
import xxhash
from families import tiny
from rule_cases import blockwise, sha256
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero import SparseConfig, UserError, sparsify
from sparse_zero.selection.columns import COLUMNS, Columns
from sparse_zero.selection.input_columns import _least_share, group_of, input_axis, number_of_columns
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import all_targets

ATTENTION = "model.layers.0.self_attn"


def reference(selection: Selection) -> list[int]:
    """columns-v1 in Python's unbounded integers."""
    drawn, shape = selection.columns, selection.shape
    width, below = shape[drawn.axis], 1 if drawn.axis == -1 else shape[-1]
    columns = blockwise(COLUMNS, selection.seed, f"{drawn.group}/{width}", width, drawn.count)
    inner = blockwise(
        COLUMNS, selection.seed, selection.name, math.prod(shape) // width * drawn.count, selection.count
    )
    found = []
    for index in inner:
        line, last = divmod(index, below)
        matrix, column = divmod(line, drawn.count)
        found.append((matrix * width + columns[column]) * below + last)
    return found


def drawn(shape: tuple[int, ...], count: int, columns: int, axis: int = -1, seed: int = 0, name: str = "q_proj"):
    own = Columns(ATTENTION, columns, axis)
    return Selection(COLUMNS, f"{ATTENTION}.{name}.weight", shape, count, seed, columns=own)


# Adapters do not store these positions: every earlier adapter depends on these numbers. A new rule gets a new name.
@pytest.mark.parametrize(
    ("selection", "expected", "first"),
    [
        (drawn((2048, 2048), 41943, 208), "41ca2e77abce2575", [80, 112, 196, 309]),
        (drawn((512, 2048), 20 * 512, 20, seed=1, name="k_proj"), "4c7d82a7c522e34d", [58, 113, 214, 320]),
        (drawn((768, 2304), 17694, 80, axis=-2, name="c_attn"), "8a6d1aa41e51c9b8", [1, 10, 22, 37]),
        (drawn((8, 64, 96), 1000, 10, seed=7), "5178f2b352902565", [10, 50, 106, 175]),
        (drawn((8, 64, 96), 6 * 8 * 96, 6, axis=-2), "987a64cc5cdc0e8e", [0, 1, 2, 3]),
        (drawn((3, 1), 1, 1), "d86e8112f3c4c444", [2]),
    ],
)
def test_golden_positions(selection, expected, first):
    assert COLUMNS == "columns-v1"
    positions = selection.positions()
    assert positions[: len(first)].tolist() == first
    assert sha256(positions) == expected


CASES = [
    *(drawn((30, 20), 60, 5), drawn((30, 20), 150, 5), drawn((30, 20), 600, 20), drawn((30, 20), 7, 3, axis=-2)),
    *(drawn((4, 6, 10), 37, 3), drawn((4, 6, 10), 50, 3, axis=-2), drawn((4, 6, 10), 120, 3, axis=-2)),
]


@pytest.mark.parametrize("selection", CASES)
def test_agrees_with_unbounded_integers(selection):
    positions = selection.positions()
    assert positions.tolist() == reference(selection)
    assert positions.diff().min() > 0
    index = torch.unravel_index(positions, selection.shape)[selection.columns.axis]
    assert {*index.tolist()} <= {*selection.drawn_columns().tolist()}
    assert selection.drawn_columns().numel() == selection.columns.count


@pytest.mark.parametrize("selection", CASES)
def test_a_slice_is_the_slice_of_the_whole(selection):
    whole, inner = selection.positions(), torch.cat([*selection.strip_chunks()])
    for start, stop in ((0, 7), (3, 5), (selection.count - 2, selection.count)):
        assert torch.equal(selection.slice(start, stop), whole[start:stop])
        assert torch.equal(torch.cat([*selection.strip_chunks("cpu", start, stop)]), inner[start:stop])
    assert torch.equal(selection.positions_of(inner, selection.drawn_columns()), whole)


@pytest.mark.parametrize("selection", CASES)
def test_rows_begin_where_the_positions_say(selection):
    inner, whole = torch.cat([*selection.strip_chunks()]), selection.positions()
    rows = torch.arange(math.prod(selection.shape[:-1]) + 1)
    starts = selection.columns.inner_starts(rows, selection.drawn_columns(), selection.shape)
    found = torch.searchsorted(inner, starts)
    assert torch.equal(found, torch.searchsorted(whole, rows * selection.shape[-1]))


def test_columns_are_uniform():
    counts = torch.zeros(64)
    for seed in range(2000):
        counts[Columns("layer", 8).drawn(seed, 64)] += 1
    # 250 each, with a standard deviation of 15
    assert 180 < counts.min() < counts.max() < 320


# Which weights share columns


def selections(model: nn.Module, **settings) -> dict[str, Selection]:
    return {s.name: s for s in select_scalars(model, SparseConfig(**settings), [])[0]}


@pytest.mark.parametrize("columns", [0.25, "whole"])
@pytest.mark.parametrize("budget", [{"density": 0.05}, {"rank_equivalent": 1}])
def test_layers_of_one_input_share_their_columns(columns, budget):
    found = selections(tiny("llama", hidden_size=32), targets="all-linear", columns=columns, **budget)
    of = {
        name.removeprefix("model.layers.1."): s.drawn_columns().tolist() for name, s in found.items() if "1." in name
    }
    q, k, v, o, gate, up, down = of.values()
    assert q == k == v
    assert gate == up
    assert len({tuple(each) for each in (q, o, gate, down)}) >= 3
    assert found["model.layers.0.self_attn.q_proj.weight"].drawn_columns().tolist() != q


def test_the_group_does_not_depend_on_wrappers():
    assert group_of("model.layers.0.self_attn.q_proj.weight") == ATTENTION
    assert group_of("model.layers.0._orig_mod.self_attn.q_proj.base_layer.weight") == ATTENTION
    assert group_of("model.layers.0._checkpoint_wrapped_module.mlp.experts.down_proj") == "model.layers.0.mlp"
    assert group_of("lm_head.weight") == ""
    assert group_of("weight") == "weight"


# How many columns


@pytest.mark.parametrize(
    ("share", "width", "expected"),
    [
        *((0.1, 30, 3), (0.07, 100, 7), (0.1, 31, 4), (1e-9, 40, 1), (0.1, 2048, 208), (0.1, 640, 64), (0.99, 67, 67)),
        *((0.1, 641, 72), (0.1, 630, 63)),
    ],
)
def test_a_share_is_rounded_up(share, width, expected):
    assert number_of_columns(share, width) == expected


def test_a_share_keeps_the_budget():
    model = tiny("llama", hidden_size=32, intermediate_size=48)
    for budget in ({"density": 0.02}, {"sparsity": 0.98}, {"rank_equivalent": 1}):
        one = selections(model, targets="all-linear", **budget)
        shared = selections(model, targets="all-linear", columns=0.25, **budget)
        assert {n: s.count for n, s in one.items()} == {n: s.count for n, s in shared.items()}
        assert {s.rule for s in shared.values()} == {COLUMNS}


def test_a_share_smaller_than_the_budget_needs_is_an_error_with_the_least_one():
    model = tiny("llama", hidden_size=32)
    settings = {"targets": ["v_proj", "down_proj"], "density": 0.05}
    with pytest.raises(UserError, match=r"columns: 0\.01: gives .* 1 of its columns, .*density: 0\.05\)") as e:
        selections(model, columns=0.01, **settings)
    least = float(str(e.value).partition("at least ")[2].split(",")[0])
    assert selections(model, columns=least, **settings)
    with pytest.raises(UserError):
        selections(model, columns=round(least - 1e-4, 4), **settings)


@pytest.mark.parametrize("width", [5, 63, 64, 71, 96, 100, 1000, 12_345])
def test_the_least_share(width):
    """Against all shares with four decimals."""
    shares = [share / 10**4 for share in range(1, 10**4 + 1)]
    given = [number_of_columns(share, width) for share in shares]
    for count in {1, 2, 5, width // 3, width // 2, min(64, width), min(65, width), width - 1, width}:
        expected = next(share for share, columns in zip(shares, given, strict=True) if columns >= count > 0)
        assert _least_share(count, width) == expected


@pytest.mark.parametrize("density", [0.01, 0.037, 0.3])
def test_whole_columns_are_as_near_to_the_budget_as_a_column_allows(density):
    model = nn.Sequential(*(nn.Linear(100 + i, 50 + 3 * i, bias=False) for i in range(9)))
    found = selections(model, targets="all-linear", columns="whole", density=density)
    wanted = round(density * sum(p.numel() for p in model.parameters()))
    assert all(s.fills_columns for s in found.values())
    assert abs(sum(s.count for s in found.values()) - wanted) <= (50 + 3 * 8) / 2
    for selection in found.values():
        rows, width = selection.shape
        assert selection.count % rows == 0
        assert abs(selection.columns.count - density * width) < 2


def test_at_least_one_column_and_it_is_said(caplog):
    model = nn.Sequential(nn.Linear(10, 40, bias=False), nn.Linear(40, 10, bias=False))
    with caplog.at_level(logging.WARNING):
        found = selections(model, targets="all-linear", columns="whole", density=0.02)
    assert [s.columns.count for s in found.values()] == [1, 1]
    assert "columns: whole trains at least one column of each weight: 50 scalars, where density: 0.02 gives 16" in (
        caplog.text
    )


def test_everything_is_every_column():
    found = selections(tiny("llama"), targets="all-linear", columns="whole", rank_equivalent=4)
    assert all(s.fills_columns and s.columns.count <= s.shape[-1] for s in found.values())


# Where an input meets a weight


class OwnExperts(nn.Module):
    def __init__(self, first: tuple[int, ...], down: tuple[int, ...], **attributes) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(first)), nn.Parameter(torch.zeros(down))
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(8, 8), -1),
        (nn.Linear(0, 8), None),
        (Conv1D(8, 8), -2),
        (nn.Embedding(8, 8), None),
        (nn.LayerNorm(8), None),
        (nn.Conv1d(4, 4, 1), None),
        (OwnExperts((2, 12, 8), (2, 8, 6)), -1),
        (OwnExperts((2, 8, 12), (2, 6, 8)), -2),
        (OwnExperts((2, 8, 8), (2, 8, 8)), None),
        (OwnExperts((2, 8, 8), (2, 8, 8), is_transposed=True), -2),
        (OwnExperts((2, 8, 8), (2, 8, 8), is_transposed=False), -1),
        (OwnExperts((2, 5, 8), (2, 7, 9)), None),
        (OwnExperts((2, 12, 8), (2, 12, 8), input_size=8, output_size=12), -1),
    ],
)
def test_the_axis(model, expected):
    targets = all_targets(model)
    for name in ("weight", "gate_up_proj", "down_proj"):
        if name in targets:
            assert input_axis(targets[name]) == expected, name


def test_the_weight_of_an_embedding_that_is_a_head_too_has_columns():
    model = tiny("llama", tie_word_embeddings=True)
    assert input_axis(all_targets(model)["model.embed_tokens.weight"]) == -1


def test_other_parameters_are_drawn_as_before_and_that_is_said_once(caplog):
    settings = {"targets": ["v_proj", "*norm", "*bias"], "density": 0.02}
    with caplog.at_level(logging.WARNING):
        found = selections(tiny("qwen2"), columns=0.5, **settings)
    before = selections(tiny("qwen2"), **settings)
    others = {name for name in found if not name.endswith("v_proj.weight")}
    assert len(others) > 5
    assert {name: found[name] for name in others} == {name: before[name] for name in others}
    (record,) = caplog.records
    assert "sparse.columns: 0.5 applies to weights of linear layers and experts" in record.message


def test_a_head_with_rows_of_new_tokens_is_drawn_as_before():
    settings = {"targets": ["lm_head", "v_proj"], "density": 0.1, "trainable_token_indices": [3, 9]}
    model = tiny("llama", tie_word_embeddings=False)
    found = selections(model, columns="whole", **settings)
    assert found["lm_head.weight"] == selections(model, **settings)["lm_head.weight"]
    assert found["lm_head.weight"].whole_rows == (3, 9)
    assert found["model.layers.0.self_attn.v_proj.weight"].rule == COLUMNS


_COLUMNS = "columns\n  Value error, must be a share above 0 and at most 1, or whole"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": 16}, "columns: 0.1 excludes granularity: 16; set columns: 1 or granularity: 1"),
        ({"selection": "bernoulli"}, "columns: 0.1 requires selection: stratified, not bernoulli"),
        ({"selection": "magnitude"}, "columns: 0.1 requires selection: stratified, not magnitude"),
        *(({"columns": value}, _COLUMNS) for value in (0, 1.5, "Whole", True, None)),
        *(({key: True}, f"{key}\n  Value error, must be a number") for key in ("density", "rank_equivalent", "seed")),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        SparseConfig(**{"columns": 0.1} | settings)


def test_a_sparse_model_has_these_positions():
    model = sparsify(tiny("llama"), SparseConfig(targets="all-linear", columns=0.5, density=0.05, seed=3))
    for weight in model.sparsity.weights.values():
        expected = torch.tensor(reference(weight.selection))
        assert torch.equal(weight.flat_positions(), expected)
        assert weight.checksum == xxhash.xxh3_64(expected.numpy()).hexdigest()
