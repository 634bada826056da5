"""A backward uses what its forward has seen, whatever ran in between; only changed deltas are an error."""

from collections.abc import Callable

import pytest
import torch
from sparse_cases import drawn, nudge
from state_cases import CONFIG, Products, X, clear, deltas, dense, gradients, mlp, output, saved, sparse_mlp
from torch import nn

from sparse_zero import (
    SparseConfig,
    UserError,
    disable_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    set_scale,
    sparsify,
    unload,
)


def disabled(model: nn.Module) -> torch.Tensor:
    with disable_adapter(model), torch.no_grad():
        return model(X)


def scaled(model: nn.Module) -> torch.Tensor:
    set_scale(model, 0.25)
    try:
        return output(model)
    finally:
        set_scale(model, 1)


def scaled_for_good(model: nn.Module) -> torch.Tensor:
    set_scale(model, 0.25)
    return output(model)


def other_adapter(model: nn.Module) -> torch.Tensor:
    set_adapter(model, "other")
    try:
        return output(model)
    finally:
        set_adapter(model, "first")


BETWEEN = [disabled, scaled, scaled_for_good, other_adapter]


@pytest.fixture
def two_adapters(tmp_path) -> Callable[[], nn.Module]:
    first, other = sparse_mlp(), sparse_mlp(seed=5)
    saved(first, tmp_path / "first")
    saved(other, tmp_path / "other")

    def load() -> nn.Module:
        model = load_adapter(mlp(), tmp_path / "first", "first")
        return load_adapter(model, tmp_path / "other", "other")

    return load


@pytest.mark.parametrize("between", BETWEEN)
def test_policy_forward_reference_forward_backward(two_adapters, between):
    """The order of DPO in TRL. The reference is computed before the policy's forward, in a model of its own."""
    model, apart = two_adapters(), two_adapters()
    policy = model(X)
    reference = between(model)
    expected = between(apart)
    assert torch.equal(reference, expected)
    (policy - reference).square().sum().backward()
    set_scale(apart, 1)
    plain = dense(apart)
    (plain(X) - expected).square().sum().backward()
    for name, flat in drawn(apart).items():
        torch.testing.assert_close(
            model.sparsity.weights[name].delta.grad, plain.get_parameter(name).grad.flatten()[flat]
        )


@pytest.mark.parametrize("between", BETWEEN)
def test_the_gradient_of_the_input_too(two_adapters, between):
    model, x = two_adapters(), X.clone().requires_grad_()
    policy = model(x)
    between(model)
    policy.sum().backward()
    set_scale(model, 1)
    expected = X.clone().requires_grad_()
    dense(model)(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_after_the_backward_the_model_is_what_was_set_last():
    model = sparse_mlp()
    y = model(X)
    set_scale(model, 0.0)
    y.sum().backward()
    assert torch.equal(output(model), output(mlp()))
    assert torch.equal(model.state_dict()["0.weight"], mlp()[0].weight)
    assert torch.equal(dict(model.named_parameters())["0.weight"], mlp()[0].weight)


def test_a_backward_within_disable_adapter_and_the_base_after_it():
    model = sparse_mlp()
    y = model(X)
    with disable_adapter(model):
        y.square().sum().backward()
        assert torch.equal(output(model), output(mlp()))
        assert torch.equal(model.state_dict()["0.weight"], mlp()[0].weight)
    assert_same_gradients(model)
    assert torch.equal(output(model), output(dense(model)))


@pytest.mark.parametrize("net", [mlp, Products])
@pytest.mark.parametrize("take_off", [unload, merge_and_unload, merge_adapter])
def test_a_backward_after_the_model_is_plain_raises_and_changes_nothing(net, take_off):
    model, x = sparsify(net(), CONFIG), X.clone().requires_grad_()
    nudge(model)
    y = model(x)
    set_scale(model, 0.5)
    take_off(model)
    before = output(model)
    with pytest.raises(UserError, match="was merged or unloaded"):
        y.square().sum().backward()
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("net", [mlp, Products])
def test_a_backward_while_an_adapter_of_other_weights_is_active(net, tmp_path):
    """The weights that it does not have must be those of the base afterwards."""
    names = [name for name, _ in net().named_parameters()]
    wide, narrow = sparsify(net(), CONFIG), sparsify(net(), SparseConfig(density=0.01, targets=names[-1:], seed=2))
    for model in (wide, narrow):
        nudge(model)
    saved(wide, tmp_path / "wide")
    saved(narrow, tmp_path / "narrow")
    model = load_adapter(load_adapter(net(), tmp_path / "wide", "wide"), tmp_path / "narrow", "narrow")
    x, expected_x = X.clone().requires_grad_(), X.clone().requires_grad_()
    y, wanted = model(x), deltas(model)
    set_adapter(model, "narrow")
    y.square().sum().backward()
    assert torch.equal(output(model), output(narrow))
    wide(expected_x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad)
    for delta, right in zip(wanted, deltas(wide), strict=True):
        torch.testing.assert_close(delta.grad, right.grad)
    assert torch.equal(output(unload(model)), output(net()))


def assert_same_gradients(model: nn.Module) -> None:
    """The gradients of y.square().sum() are those of the dense weights."""
    plain = dense(model)
    plain(X).square().sum().backward()
    for name, flat in drawn(model).items():
        torch.testing.assert_close(
            model.sparsity.weights[name].delta.grad, plain.get_parameter(name).grad.flatten()[flat]
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.optim.SGD(deltas(model), lr=1.0).step(),
        lambda model: nudge(model),
        lambda model: model.load_state_dict(sparse_mlp(seed=1).state_dict()),
        lambda model: [setattr(delta, "data", delta.data + 1) for delta in deltas(model)],
    ],
    ids=["step", "in place", "load_state_dict", "data"],
)
def test_changed_deltas_are_an_error(change):
    model = sparse_mlp(seed=1)
    for delta in deltas(model):
        delta.grad = torch.ones_like(delta)
    y = model(X)
    change(model)
    with pytest.raises(UserError, match="have changed between a forward and the backward"):
        y.square().sum().backward()


def test_a_retained_graph_gives_its_gradient_again():
    model = sparse_mlp()
    y = model(X).square().sum()
    y.backward(retain_graph=True)
    first = gradients(model)
    clear(model)
    disabled(model)
    y.backward()
    assert all(torch.equal(*pair) for pair in zip(gradients(model), first, strict=True))
