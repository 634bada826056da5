"""A trained parameter that got no gradient before the first optimizer step is named in one warning."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from families import tiny
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from sparse_zero.model.sparsify import sparsify, unload
from sparse_zero.selection.config import SparseConfig

INPUTS = torch.ones(3, 6)
WARNING = " got no gradient before the first optimizer step, so their values stay as they are"


class Blocks(nn.Module):
    """Three linear layers, of which the second can run in different ways."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.way = way

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        match self.way:
            case "skipped":
                hidden = self.first(inputs)
            case "without autograd":
                with torch.no_grad():
                    hidden = self.second(inputs)
            case "reentrant":
                hidden = checkpoint(lambda x: self.second(self.first(x)), inputs, use_reentrant=True)
            case "not reentrant":
                hidden = checkpoint(lambda x: self.second(self.first(x)), inputs, use_reentrant=False)
            case _:
                hidden = self.second(self.first(inputs))
        return self.last(hidden)


def sparse(way: str = "plain", **settings: Any) -> nn.Module:
    return sparsify(Blocks(way), SparseConfig(**{"density": 0.2, "targets": "all-linear"} | settings))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(INPUTS).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CASES = {
    "skipped": "second.weight",
    "without autograd": "first.weight and 1 more",
    "reentrant": "first.weight and 1 more",
    "plain": None,
    "not reentrant": None,
}


def hooks_of(model: nn.Module) -> list[Any]:
    return [parameter._backward_hooks for parameter in model.parameters() if parameter._backward_hooks]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", CASES)
def test_what_got_no_gradient_is_named_once(caplog, way):
    model = sparse(way)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    assert [message.partition(".  Either")[0].startswith(f"{CASES[way]}{WARNING}") for message in caplog.messages] == (
        [True] if CASES[way] else []
    )
    for _ in range(2):
        step(model, optimizer)
    assert len(caplog.messages) == (CASES[way] is not None)


def test_nothing_is_left_after_the_first_step():
    model = sparse("skipped")
    assert len(hooks_of(model)) == 3
    step(model, optimizer_of(model))
    assert hooks_of(model) == []
    assert model.sparsity.counter.watch is None


def test_modules_that_are_trained_in_full_count_too(caplog):
    model = sparse("skipped", density=0.5, targets=["first", "last"], modules_to_save=["second"])
    step(model, optimizer_of(model))
    (message,) = caplog.messages
    assert message.startswith(f"second.weight and 1 more{WARNING}")


def test_if_only_a_parameter_of_the_users_own_got_a_gradient(caplog):
    model = sparse("without autograd", targets=["first", "second"])
    own = model.last.bias.requires_grad_(True)
    step(model, torch.optim.SGD([own, *(p for p in model.parameters() if p.requires_grad and p is not own)], lr=0.1))
    (message,) = caplog.messages
    assert message.startswith(f"first.weight and 1 more{WARNING}")


def test_gradients_may_arrive_in_any_micro_batch_before_the_step(caplog):
    model = sparse("skipped")
    optimizer = optimizer_of(model)
    model(INPUTS).sum().backward()
    model.way = "plain"
    step(model, optimizer)
    assert caplog.messages == []


def test_deltas_that_the_user_froze_are_not_named(caplog):
    model = sparse("skipped")
    model.sparsity.weights["second.weight"].delta.requires_grad_(False)
    step(model, optimizer_of(model))
    assert caplog.messages == []


def test_a_step_without_a_backward_does_not_count(caplog):
    model = sparse("skipped")
    optimizer = optimizer_of(model)
    optimizer.step()
    other = nn.Linear(6, 6)
    step(other, optimizer_of(other))
    assert caplog.messages == []
    step(model, optimizer)
    assert len(caplog.messages) == 1


def test_gradients_that_are_assigned(caplog):
    model = sparse()
    optimizer = optimizer_of(model)
    for weight in model.sparsity.weights.values():
        weight.delta.grad = torch.ones_like(weight.delta)
    optimizer.step()
    assert caplog.messages == []


@pytest.mark.parametrize("way", ["skipped", "plain"])
def test_an_optimizer_with_parameters_of_its_own(caplog, way):
    """DeepSpeed takes each gradient out of `.grad` and steps a flat partition."""
    model = sparse(way)
    flat = nn.Parameter(torch.zeros(1))
    for weight in model.sparsity.weights.values():
        weight.delta.register_post_accumulate_grad_hook(lambda delta: setattr(delta, "grad", None))
    step(model, torch.optim.SGD([flat], lr=0.1))
    assert [message.partition(" ")[0] for message in caplog.messages] == (
        ["second.weight"] if way == "skipped" else []
    )


def test_the_trainer_of_transformers(caplog, tmp_path):
    model = sparsify(tiny("llama"), SparseConfig(density=0.01))
    ids = torch.arange(4, 10)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 2).train()
    named = [message for message in caplog.messages if WARNING in message]
    assert len(named) == 1


@pytest.mark.parametrize("way", ["skipped", "plain"])
def test_compiled(caplog, way):
    model = sparse(way)
    compiled = torch.compile(model, backend="eager")
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(compiled, optimizer)
    assert len([m for m in caplog.messages if WARNING in m]) == (way == "skipped")


def copies(model: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("trained_before", [False, True])
def test_copies_train_and_leave_the_original_alone(caplog, trained_before):
    model = sparse("skipped")
    if trained_before:
        step(model, optimizer_of(model))
        caplog.clear()
    for twin in copies(model):
        assert hooks_of(twin) == []
        step(twin, optimizer_of(twin))
        unload(twin)
    assert caplog.messages == []
    step(model, optimizer_of(model))
    assert len(caplog.messages) == (not trained_before)


def test_unload_removes_the_hooks():
    model = sparse(density=0.5, targets=["first", "last"], modules_to_save=["second"])
    counter = model.sparsity.counter
    unload(model)
    assert hooks_of(model) == []
    other = nn.Linear(6, 6)
    step(other, optimizer_of(other))
    assert counter.watch is None


def test_the_hooks_do_not_keep_the_model():
    model = sparse()
    gone = weakref.ref(model.sparsity.weights["first.weight"].delta)
    del model
    gc.collect()
    assert gone() is None
