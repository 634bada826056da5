"""Combinations against plain arithmetic on dense deltas, and against PEFT's own functions."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from families import tiny
from peft.utils import merge_utils
from torch import nn

from sparse_zero import (
    SparseConfig,
    UserError,
    combine_adapters,
    load_adapter,
    merge_and_unload,
    save_adapter,
    sparsify,
)
from sparse_zero.adapters.files import read_adapter

TYPES = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
OVERLAPPING = [
    SparseConfig(density=0.09, targets=["up_proj", "v_proj"], seed=1),
    SparseConfig(density=0.1, targets=["up_proj", "down_proj", "norm"], seed=2),
    SparseConfig(density=0.08, targets=["up_proj", "v_proj"], seed=1, selection="magnitude"),
]
WEIGHTS = [0.7, -0.4, 1.5]


def make(config: SparseConfig, directory: Path, seed: int, base: nn.Module | None = None) -> Path:
    model = sparsify(tiny("llama") if base is None else base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.copy_(torch.randn(weight.delta.shape, generator=generator))
    save_adapter(model, directory)
    return directory


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory) -> list[Path]:
    return [make(config, tmp_path_factory.mktemp("adapter"), seed) for seed, config in enumerate(OVERLAPPING)]


@pytest.fixture(scope="module")
def alike(tmp_path_factory) -> list[Path]:
    """Adapters with the same positions."""
    return [make(OVERLAPPING[0], tmp_path_factory.mktemp("adapter"), seed) for seed in range(3)]


def dense(directory: Path) -> dict[str, torch.Tensor]:
    """The adapter's deltas as matrices, from the difference of merged and base weights."""
    base = tiny("llama")
    merged = merge_and_unload(load_adapter(copy.deepcopy(base), directory))
    return {name: p.detach() - base.get_parameter(name).detach() for name, p in merged.named_parameters()}


def test_linear_is_the_weighted_sum_of_the_dense_deltas(overlapping, tmp_path):
    combine_adapters(overlapping, tmp_path, WEIGHTS)
    parts, found = [dense(directory) for directory in overlapping], dense(tmp_path)
    for name, delta in found.items():
        expected = sum(weight * part[name] for weight, part in zip(WEIGHTS, parts, strict=True))
        torch.testing.assert_close(delta, expected, rtol=0, atol=2e-6)
    assert sum(delta.count_nonzero() for delta in found.values()) > 300


@pytest.mark.parametrize("combination_type", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_equals_peft_on_the_dense_deltas_where_nothing_is_pruned(overlapping, tmp_path, combination_type):
    combine_adapters(overlapping, tmp_path, WEIGHTS, combination_type)
    parts, found = [dense(directory) for directory in overlapping], dense(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        for name, delta in found.items():
            matrices = [part[name] for part in parts]
            expected = getattr(merge_utils, combination_type)(matrices, torch.tensor(WEIGHTS), density=1.0)
            torch.testing.assert_close(delta, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("combination_type", ["ties", "magnitude_prune"])
def test_pruning_equals_peft_on_the_selected_scalars(alike, tmp_path, combination_type, density):
    combine_adapters(alike, tmp_path, WEIGHTS, combination_type, density)
    parts, found = [read_adapter(directory) for directory in alike], read_adapter(tmp_path)
    for name, values in found.deltas.items():
        vectors = [part.deltas[name] for part in parts]
        expected = getattr(merge_utils, combination_type)(vectors, torch.tensor(WEIGHTS), density=density)
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("combination_type", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_random_fraction_and_scales_it_up(alike, tmp_path, combination_type):
    one, again, other = (tmp_path / name for name in ("one", "again", "other"))
    for out, seed in ((one, 0), (again, 0), (other, 1)):
        combine_adapters(alike[:1], out, [1.0], combination_type, density=0.3, seed=seed)
    values, before = (torch.cat(list(read_adapter(d).deltas.values())) for d in (one, alike[0]))
    kept = values != 0
    assert abs(kept.float().mean() - 0.3) < 0.05
    torch.testing.assert_close(values[kept], before[kept] / 0.3)
    assert torch.equal(values, torch.cat(list(read_adapter(again).deltas.values())))
    assert not torch.equal(values, torch.cat(list(read_adapter(other).deltas.values())))


def test_the_default_weights_are_the_mean(alike, tmp_path):
    combine_adapters(alike, tmp_path / "mean")
    combine_adapters(alike, tmp_path / "thirds", [1 / 3] * 3)
    one, other = read_adapter(tmp_path / "mean"), read_adapter(tmp_path / "thirds")
    assert all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)


def test_positions_that_all_have_drawn_are_not_stored(alike, overlapping, tmp_path):
    combine_adapters(alike, tmp_path / "alike")
    combine_adapters(overlapping, tmp_path / "overlapping")
    assert not (tmp_path / "alike" / "adapter_positions.safetensors").exists()
    assert (tmp_path / "overlapping" / "adapter_positions.safetensors").exists()


def test_heads_and_tokens_are_averaged(tmp_path):
    directories, heads, rows = [], [], []
    config = SparseConfig(density=0.1, trainable_token_indices=[7])
    for seed in range(2):
        model = sparsify(tiny("llama", "sequence-classification"), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
            heads.append(model.score.weight.clone())
            rows.append(merge_and_unload(copy.deepcopy(model)).model.embed_tokens.weight[7].clone())
        directories.append(tmp_path / str(seed))
        save_adapter(model, directories[-1])
    combine_adapters(directories, tmp_path / "both", [3.0, 1.0])
    merged = merge_and_unload(load_adapter(tiny("llama", "sequence-classification"), tmp_path / "both"))
    torch.testing.assert_close(merged.score.weight, 0.75 * heads[0] + 0.25 * heads[1])
    torch.testing.assert_close(merged.model.embed_tokens.weight[7], 0.75 * rows[0] + 0.25 * rows[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0]}, "weights: 1 for 3 adapters; pass one for each"),
        ({"weights": [0.0, 0.0, 0.0]}, "not all zero"),
        ({"weights": [1.0, 1.0, float("nan")]}, "finite"),
        ({"combination_type": "svd"}, "combination_type: 'svd'; known: linear, ties"),
        ({"density": 0.0}, "density: 0; pass the fraction"),
    ],
)
def test_settings_that_cannot_be(alike, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        combine_adapters(alike, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_belong_together(alike, tmp_path):
    other_base = make(OVERLAPPING[0], tmp_path / "base", 0, tiny("llama", seed=1))
    with pytest.raises(UserError, match=r"trained on different base models.*'lm_head.weight' differs"):
        combine_adapters([alike[0], other_base], tmp_path / "out")
    with_head = make(OVERLAPPING[0].model_copy(update={"modules_to_save": ["norm"]}), tmp_path / "head", 0)
    with pytest.raises(UserError, match="different fully trained parameters"):
        combine_adapters([alike[0], with_head], tmp_path / "out")
    tokens = make(OVERLAPPING[0].model_copy(update={"trainable_token_indices": [3]}), tmp_path / "tokens", 0)
    with pytest.raises(UserError, match="different fully trained tokens"):
        combine_adapters([alike[0], tokens], tmp_path / "out")
    with pytest.raises(UserError, match="is one of the adapters to combine"):
        combine_adapters(alike, alike[1])
