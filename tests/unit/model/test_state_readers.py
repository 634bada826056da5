"""Whoever reads the weights of a sparse model gets those of now: after a step, and after a change behind its back."""

import copy
import io
from collections.abc import Callable

import numpy
import pytest
import torch
from accelerate import Accelerator
from state_cases import CONFIG, X, deltas, dense, mlp, output, sparse_mlp
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sparse_zero import disable_adapter, refresh, set_scale, sparsify

KEPT = "_kept_reference"

READERS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "state_dict": lambda model: model.state_dict()["0.weight"],
    "state_dict of a layer": lambda model: model[0].state_dict()["weight"],
    "named_parameters": lambda model: dict(model.named_parameters())["0.weight"],
    "parameters": lambda model: next(p for p in model.parameters() if p.shape == (20, 10)),
    "parameters of a layer": lambda model: next(p for p in model[0].parameters() if p.dim() == 2),
    "get_parameter": lambda model: model.get_parameter("0.weight"),
    "attribute": lambda model: model[0].weight,
    "kept reference": lambda model: vars(model)[KEPT],
    "_parameters": lambda model: model[0]._parameters["weight"],
    "deepcopy": lambda model: copy.deepcopy(model)[0]._parameters["weight"],
    "copy": lambda model: copy.copy(model)[0]._parameters["weight"],
    "torch.save": lambda model: pickled(model)[0]._parameters["weight"],
}


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def torch_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()


def closure_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step(lambda: loss)


def accelerate_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(optimizer)
    accelerator.backward(loss)
    prepared.step()


@pytest.mark.parametrize("step", [torch_step, closure_step, accelerate_step])
@pytest.mark.parametrize("reader", READERS)
def test_after_a_step(reader, step):
    model = sparse_mlp()
    optimizer = torch.optim.SGD(deltas(model), lr=1.0)
    vars(model)[KEPT] = model[0]._parameters["weight"]
    before = dense(model)[0].weight
    step(optimizer, model(X).square().mean())
    values = READERS[reader](model).detach().clone()
    assert torch.equal(values, dense(model)[0].weight)
    assert not torch.equal(values, before)


def test_a_step_that_changes_one_of_two_models():
    one, other = sparse_mlp(), sparse_mlp(seed=4)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    optimizer = torch.optim.SGD([{"params": deltas(one)}, {"params": deltas(other), "lr": 0.0}], lr=1.0)
    (one(X).square().mean() + other(X).square().mean()).backward()
    kept = one[0]._parameters["weight"]
    optimizer.step()
    assert torch.equal(kept, dense(one)[0].weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def multiply(delta: torch.Tensor) -> None:
    delta.data.mul_(3)


def assign_data(delta: torch.Tensor) -> None:
    delta.data = delta.data * 3


def in_numpy(delta: torch.Tensor) -> None:
    numpy.multiply(delta.detach().numpy(), 3, out=delta.detach().numpy())


def swap(delta: torch.Tensor) -> None:
    delta.untyped_storage().copy_((delta.detach() * 3).untyped_storage())


def all_as_a_vector(parameters: list[nn.Parameter]) -> None:
    vector_to_parameters(parameters_to_vector(parameters) * 3, parameters)


CHANGES = {
    "delta.data.mul_": lambda parameters: [multiply(delta) for delta in parameters],
    "delta.data =": lambda parameters: [assign_data(delta) for delta in parameters],
    "numpy": lambda parameters: [in_numpy(delta) for delta in parameters],
    "storage": lambda parameters: [swap(delta) for delta in parameters],
    "vector_to_parameters": all_as_a_vector,
}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_sees_changes_that_autograd_does_not_count(change, trains):
    model = sparse_mlp()
    output(model)
    before = dense(model)
    CHANGES[change](deltas(model))
    expected = output(dense(model))
    assert not torch.equal(expected, output(before))
    with torch.set_grad_enabled(trains):
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_so_does_a_state_dict_and_refresh(change):
    model = sparse_mlp()
    CHANGES[change](deltas(model))
    assert torch.equal(model.state_dict()["0.weight"], dense(model)[0].weight)
    CHANGES[change](deltas(model))
    refresh(model)
    assert torch.equal(model[0]._parameters["weight"], dense(model)[0].weight)


def test_a_scale_is_in_the_weights_at_once():
    model = sparse_mlp()
    kept = model[0]._parameters["weight"]
    whole = dense(model)[0].weight.detach()
    set_scale(model, 0.5)
    torch.testing.assert_close(kept.detach(), (whole + mlp()[0].weight.detach()) / 2)
    with disable_adapter(model):
        assert torch.equal(kept, mlp()[0].weight)
    set_scale(model, 1)
    assert torch.equal(kept, whole)


class Around(nn.Module):
    """Reads a weight around the module's attribute, so that the delta gets no gradient."""

    def __init__(self, read: Callable[["Around"], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(10, 4, bias=False), read
        self.side = [self.layer.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.read(self).T


@pytest.mark.parametrize(
    "read",
    [
        lambda model: next(model.layer.parameters()),
        lambda model: model.layer._parameters["weight"],
        lambda model: model.layer.state_dict(keep_vars=True)["weight"],
        lambda model: model.side[0],
        lambda model: model.get_parameter("layer.weight"),
    ],
    ids=["parameters", "_parameters", "state_dict", "list", "get_parameter"],
)
def test_readers_that_go_around_the_module(read):
    torch.manual_seed(0)
    model = sparsify(Around(read), CONFIG)
    base = model.layer._parameters["weight"].detach().clone()
    weight = model.sparsity.weights["layer.weight"]
    for factor in (1, 2):
        with torch.no_grad():
            weight.delta.fill_(factor)
        values = base.flatten().index_add(0, weight.flat_positions(), weight.delta.detach()).view(4, 10)
        assert torch.equal(model(X), X @ values.T)


def test_copies_are_independent():
    model = sparse_mlp()
    other = copy.deepcopy(model)
    third = pickled(model)
    expected = output(model)
    for copied in (other, third):
        optimizer = torch.optim.SGD(deltas(copied), lr=1.0)
        copied(X).square().mean().backward()
        optimizer.step()
        # The copy's own weights are written, without a forward
        assert torch.equal(copied[0]._parameters["weight"], dense(copied)[0].weight)
        assert torch.equal(output(copied), output(dense(copied)))
    assert torch.equal(output(model), expected)
    assert torch.equal(output(dense(model)), expected)
