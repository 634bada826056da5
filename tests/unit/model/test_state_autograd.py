"""Checkpointing, hooks on saved tensors, derivatives that are refused, and threads."""

import sys
import threading

import pytest
import torch
from families import tiny
from sparse_cases import assert_gradients, batch_of, nudge, trainable
from state_cases import CONFIG, Products, X, clear, deltas, dense, gradients, mlp, output, sparse_mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_zero import (
    SparseConfig,
    UserError,
    disable_adapter,
    set_scale,
    sparsify,
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


# Checkpointing and hooks


class Checkpointed(nn.Module):
    """Three layers, the second of which is recomputed in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(12, 10), nn.Linear(10, 4)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        return self.c(checkpoint(lambda h: torch.tanh(self.b(h)), hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    base = Checkpointed(reentrant)
    model = sparsify(Checkpointed(reentrant), CONFIG)
    nudge(model)
    assert_gradients(model, dense(model, base), lambda net: net(X).square().sum().backward())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", [disabled, scaled])
def test_gradient_checkpointing_with_another_forward_in_between(reentrant, between):
    base = Checkpointed(reentrant)
    model = sparsify(Checkpointed(reentrant), CONFIG)
    nudge(model)

    def backward(net: nn.Module) -> None:
        y = net(X)
        if net is model:
            between(model)
        y.square().sum().backward()

    assert_gradients(model, dense(model, base), backward)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooks_on_saved_tensors_see_the_same_activations_as_in_a_plain_model(family):
    base = tiny(family)
    base.requires_grad_(False)
    base.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())
    model = tiny(family)
    sparsify(model, SparseConfig(density=0.1, targets="all-linear"))
    batch, bytes_seen = batch_of(family), {}
    for net in (base, model):
        packed = []

        def pack(tensor: torch.Tensor, packed: list = packed) -> torch.Tensor:
            packed.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(**batch).loss.backward()
        bytes_seen[net] = sum(packed)
    # A plain frozen model saves its weights, a sparse one their inputs
    assert bytes_seen[model] > 0.5 * bytes_seen[base]


def test_save_on_cpu_gives_the_same_gradients_and_gets_every_activation():
    model = sparse_mlp()
    model(X).square().sum().backward()
    expected = gradients(model)
    clear(model)
    seen = []

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        seen.append(tensor.shape)
        return tensor.clone(), tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        model(X).square().sum().backward()
    assert torch.Size([4, 10]) in seen  # the first layer's input
    assert torch.Size([4, 20]) in seen  # the second layer's
    assert torch.Size([20, 10]) not in seen  # weights are saved by reference
    assert all(torch.equal(*pair) for pair in zip(gradients(model), expected, strict=True))
    clear(model)
    with torch.autograd.graph.save_on_cpu():
        y = model(X).square().sum()
    disabled(model)
    y.backward()
    assert all(torch.equal(*pair) for pair in zip(gradients(model), expected, strict=True))


def test_hooks_get_what_a_module_saves_beside_its_weights():
    model, shapes = sparsify(Products(), CONFIG), {}
    for net in (Products(), model):
        seen = shapes[net] = []

        def pack(tensor: torch.Tensor, seen: list = seen) -> torch.Tensor:
            seen.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(X)
        assert torch.Size([4, 6]) in seen  # of tanh
    assert torch.Size([4, 10]) in shapes[model]


# What is refused


@pytest.mark.parametrize("net", [mlp, Products])
def test_second_derivatives_raise(net):
    model = sparsify(net(), CONFIG)
    nudge(model)
    with pytest.raises(UserError, match="second derivatives"):
        torch.autograd.grad(model(X).square().sum(), deltas(model), create_graph=True)
    with pytest.raises(UserError, match="second derivatives"):
        model(X).square().sum().backward(create_graph=True)


def test_second_derivatives_of_the_input_raise():
    model, x = sparse_mlp(), X.clone().requires_grad_()
    with pytest.raises(UserError, match="second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    # Without deltas in the graph they are those of a plain model
    with disable_adapter(model):
        (one,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (two,) = torch.autograd.grad(one.square().sum(), x)
    plain = mlp()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(two, expected)


def test_transforms_are_refused():
    model = sparse_mlp()
    values = {name: p.detach() for name, p in model.named_parameters() if name.endswith("_delta")}
    with pytest.raises(UserError, match=r"torch\.func"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().sum())(values)
    with pytest.raises(UserError, match=r"torch\.func"):
        torch.vmap(model)(X[:, None])


def test_forward_mode_of_the_input():
    model, tangent = sparse_mlp(), torch.ones_like(X)
    with torch.autograd.forward_ad.dual_level():
        result = model(torch.autograd.forward_ad.make_dual(X, tangent))
        ours = torch.autograd.forward_ad.unpack_dual(result).tangent
    _, expected = torch.func.jvp(dense(model), (X,), (tangent,))
    torch.testing.assert_close(ours, expected)


def test_threads_that_train_one_model():
    """Each thread runs its own forwards and backwards; the gradients add up, none is counted twice."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), TwoReads(20))
    model = sparsify(base, CONFIG)
    nudge(model)
    inputs = torch.randn(4, 25, 4, 10)
    for x in inputs.view(-1, 4, 10):
        model(x).square().sum().backward()
    expected = gradients(model)
    clear(model)
    errors: list[BaseException] = []

    def work(part: torch.Tensor) -> None:
        try:
            for x in part:
                model(x).square().sum().backward()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(part,)) for part in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert errors == []
    for ours, right in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-3)


class TwoReads(nn.Module):
    """Reads its weight twice in a forward."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w) @ self.w


def test_only_the_deltas_require_a_gradient():
    model = sparse_mlp()
    assert {id(p) for p in trainable(model)} == {id(p) for p in deltas(model)}
