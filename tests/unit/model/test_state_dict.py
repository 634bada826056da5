"""State dicts of sparse models: what is saved is what is there after loading, whatever was there before."""

import contextlib
import copy
import io

import pytest
import torch
from families import tiny
from sparse_cases import batch_of, dense_copy, nudge, output_of
from state_cases import (
    CONFIG,
    HEAD,
    X,
    deltas,
    dense,
    dense_with_head,
    mlp,
    output,
    saved,
    sparse_mlp,
    with_head,
)
from torch import nn

from sparse_zero import (
    SparseConfig,
    disable_adapter,
    load_adapter,
    merge_and_unload,
    set_adapter,
    sparsify,
    unload,
)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("indices", ["stored", "regenerated"])
def test_into_a_model_that_was_sparsified_from_other_weights(strict, assign, indices):
    """As when a model is built from a config with random weights, and a checkpoint is loaded."""
    model = sparse_mlp(indices=indices)
    plain = dense(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = sparsify(mlp(9), CONFIG.model_copy(update={"indices": indices}))
    result = other.load_state_dict(state, strict=strict, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(output(other), output(plain))
    again = other.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    # It trains on: the gradient is that of the dense weight at the positions
    other(X).square().sum().backward()
    plain(X).square().sum().backward()
    for name, weight in other.sparsity.weights.items():
        expected = plain.get_parameter(name).grad.flatten()[weight.flat_positions()]
        torch.testing.assert_close(weight.delta.grad, expected)
    with disable_adapter(other):
        assert torch.equal(output(other), output(mlp()))
    assert torch.equal(output(unload(other)), output(mlp()))


@pytest.mark.parametrize("assign", [False, True])
def test_pretrained_weights_that_are_loaded_after_sparsify(assign):
    pretrained, model = mlp(5), sparsify(mlp(), CONFIG)
    state = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=assign)
    assert torch.equal(output(model), output(pretrained))
    nudge(model)
    assert torch.equal(output(model), output(dense(model, pretrained)))
    assert torch.equal(output(unload(model)), output(pretrained))


def test_deltas_stay_when_other_pretrained_weights_are_loaded():
    model = sparse_mlp()
    model.load_state_dict(mlp(5).state_dict(), strict=False)
    assert torch.equal(output(model), output(dense(model, mlp(5))))


def test_deltas_alone():
    model, other = sparse_mlp(), sparsify(mlp(), CONFIG)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith("_delta")}, strict=False)
    assert torch.equal(output(other), output(dense(model)))


def test_a_weight_that_is_assigned():
    model, plain = sparsify(mlp(), CONFIG), mlp()
    model[0].weight = nn.Parameter(mlp(5)[0].weight.detach().clone())
    plain[0].weight = nn.Parameter(mlp(5)[0].weight.detach().clone())
    assert torch.equal(output(model), output(plain))
    assert not model[0]._parameters["weight"].requires_grad
    nudge(model)
    assert torch.equal(output(model), output(dense(model, plain)))
    assert torch.equal(output(unload(model)), output(plain))


def test_the_weights_in_a_state_dict_are_those_of_the_merged_model():
    model = sparse_mlp()
    plain = mlp()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(output(plain), output(dense(model)))
    merged = merge_and_unload(copy.deepcopy(model)).state_dict()
    assert all(torch.equal(plain.state_dict()[name], merged[name]) for name in merged)


@pytest.mark.parametrize("save_within", [False, True])
@pytest.mark.parametrize("load_within", [False, True])
def test_fully_trained_modules_and_disable_adapter(save_within, load_within):
    model = with_head()
    expected = output(dense_with_head(model))
    file = io.BytesIO()
    with disable_adapter(model) if save_within else contextlib.nullcontext():
        torch.save(model.state_dict(), file)
    file.seek(0)
    other = sparsify(mlp(9), HEAD)
    with disable_adapter(other) if load_within else contextlib.nullcontext():
        other.load_state_dict(torch.load(file))
        if load_within:
            assert torch.equal(other[0].weight, mlp()[0].weight)
            assert torch.equal(other[2].weight, mlp(9)[2].weight)
    assert torch.equal(output(other), expected)
    assert torch.equal(output(model), expected)


class Outer(nn.Module):
    """A model that contains a sparse one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_sparse_model_within_a_larger_one():
    model = Outer(with_head())
    expected = output(model)
    for delta in deltas(model.inner):
        delta.data.mul_(1)
    other = Outer(sparsify(mlp(9), HEAD))
    with disable_adapter(other.inner):
        other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), expected)
    other.load_state_dict({f"inner.{name}": tensor for name, tensor in mlp(5).state_dict().items()}, strict=False)
    with disable_adapter(other.inner):
        assert torch.equal(output(other), output(mlp(5)))
    assert torch.equal(output(unload(other.inner)), output(mlp(5)))


@pytest.mark.parametrize("source", [lambda: mlp(5), lambda: sparsify(mlp(5), CONFIG)])
def test_another_base_is_that_of_all_adapters(source, tmp_path):
    saved(sparse_mlp(), tmp_path / "a")
    saved(sparse_mlp(seed=1), tmp_path / "b")
    model = load_adapter(load_adapter(mlp(), tmp_path / "a", "a"), tmp_path / "b", "b")
    set_adapter(model, "b")
    set_adapter(model, "a")
    model.load_state_dict(source().state_dict(), strict=False)
    for name in "abab":
        set_adapter(model, name)
        assert torch.equal(output(model), output(dense(model, mlp(5))))
        with disable_adapter(model):
            assert torch.equal(output(model), output(mlp(5)))
    assert torch.equal(output(unload(model)), output(mlp(5)))


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
@pytest.mark.parametrize("assign", [False, True])
def test_tied_weights(family, assign):
    config = SparseConfig(density=0.1, targets="all", seed=2)
    base = tiny(family).eval()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model = sparsify(copy.deepcopy(base), config)
    nudge(model)
    batch = batch_of("llama")
    with torch.no_grad():
        expected = output_of(dense_copy(base, model), batch)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        other = sparsify(tiny(family, seed=9).eval(), config)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(output_of(other, batch), expected)
        with disable_adapter(other):
            assert torch.equal(output_of(other, batch), output_of(base, batch))
    assert other.get_input_embeddings()._parameters["weight"] is other.get_output_embeddings()._parameters["weight"]
    assert len(list(other.parameters())) == len(list(model.parameters()))


def test_another_selection_is_refused_before_anything_is_changed():
    state, other = sparse_mlp().state_dict(), sparsify(mlp(9), CONFIG.model_copy(update={"seed": 7}))
    before = output(other)
    with pytest.raises(RuntimeError, match="saved with another selection"):
        other.load_state_dict(state)
    assert torch.equal(output(other), before)


def test_a_refused_state_dict_leaves_fully_trained_modules():
    model, state = with_head(), with_head(seed=1).state_dict()
    before = output(model)
    with pytest.raises(RuntimeError, match="saved with another selection"):
        model.load_state_dict(state)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_without_original_values(assign):
    """As of version 0.1: right only in a model with the same original values."""
    model = sparse_mlp()
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(("_base", "_positions"))}
    other = sparsify(mlp(), CONFIG)
    other.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
    assert torch.equal(output(other), output(dense(model)))
    with disable_adapter(other):
        assert torch.equal(output(other), output(mlp()))
    third = sparsify(mlp(9), CONFIG)
    with pytest.raises(RuntimeError, match="without the original values"):
        third.load_state_dict(state, assign=assign)
    assert torch.equal(output(third), output(mlp(9)))


def test_pretrained_weights_of_fully_trained_modules_are_original_values_too():
    model = with_head()
    model.load_state_dict(mlp(5).state_dict(), strict=False)
    with disable_adapter(model):
        assert torch.equal(output(model), output(mlp(5)))
    assert torch.equal(output(unload(model)), output(mlp(5)))
