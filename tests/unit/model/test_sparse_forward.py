"""The weights contain the deltas whenever the model runs, and backward uses the same values as the forward."""

import contextlib
import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from sparse_cases import (
    CASES,
    adamw,
    assert_gradients,
    assert_same_bits,
    batch_of,
    batches,
    both,
    dense_copy,
    loss_of,
    nudge,
    output_of,
    plain_state,
    train,
    trainable,
)
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import unload
from sparse_zero.model.weight import SparseWeight


@pytest.fixture
def writes(monkeypatch) -> list[SparseWeight]:
    """Gets an entry each time that deltas are written into a weight."""
    calls, alone, together = [], SparseWeight.write_values, SparseWeight.operands

    def counted_together(weight: SparseWeight, *args: Any) -> Any:
        operands = together(weight, *args)
        calls.extend([weight] if operands is not None else [])
        return operands

    monkeypatch.setattr(
        SparseWeight, "write_values", lambda weight, *args: (calls.append(weight), alone(weight, *args))[1]
    )
    monkeypatch.setattr(SparseWeight, "operands", counted_together)
    return calls


@contextlib.contextmanager
def evaluating(model: nn.Module, how: str) -> Iterable[None]:
    model.eval() if how == "eval" else model.train()
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(how, contextlib.nullcontext)
    with context():
        yield


@pytest.mark.parametrize("how", ["no_grad", "inference", "eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_the_forward_after_a_step_sees_it(case, how):
    base, model = both(case)
    head = {name: model.get_parameter(name) for name in model.sparsity.whole}
    for step in range(2):
        train(model, batches(case, 1, seed=step))
        dense = dense_copy(base, model)
        dense.load_state_dict(head, strict=False)
        with evaluating(model, how), evaluating(dense, how):
            assert torch.equal(output_of(model, batch_of(case)), output_of(dense, batch_of(case)))


def test_generate_after_a_step_sees_it():
    base, model = both("llama", density=0.1)
    prompt = batch_of("llama")["input_ids"]
    # Ignore the end-of-sequence token: long texts are more likely to differ
    settings = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
    before = model.generate(prompt, **settings)
    optimizer = torch.optim.SGD(trainable(model), lr=30.0)
    loss_of(model, batch_of("llama")).backward()
    optimizer.step()
    after = model.generate(prompt, **settings)
    assert torch.equal(after, dense_copy(base, model).generate(prompt, **settings))
    assert not torch.equal(after, before)


def test_deltas_are_written_once_per_optimizer_step(writes):
    _, model = both("llama")
    optimizer = adamw(trainable(model))
    weights = len(model.sparsity.weights)
    for step in range(3):
        for batch in batches("llama", 4, seed=step):
            loss_of(model, batch).backward()
        with torch.no_grad():
            output_of(model, batch_of("llama"))
        assert len(writes) == weights * step
        optimizer.step()


def test_gradient_checkpointing_writes_no_deltas_of_its_own(writes):
    _, model = both("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    train(model, batches("llama", 3))
    assert len(writes) == 3 * len(model.sparsity.weights)


class DataSGD(torch.optim.Optimizer):
    """An optimizer that changes `parameter.data`, which autograd does not count, as some older ones do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad.data)


@torch.no_grad()
def step_by_hand(model: nn.Module) -> None:
    for parameter in trainable(model):
        parameter -= parameter.grad


@pytest.mark.parametrize("step", [step_by_hand, lambda model: DataSGD(trainable(model)).step()], ids=["hand", "data"])
def test_an_optimizer_of_ones_own(step):
    base, model = both("mlp")
    loss_of(model, batch_of("mlp")).backward()
    step(model)
    assert all(weight.delta.abs().max() > 0 for weight in model.sparsity.weights.values())
    dense = dense_copy(base, model)
    assert torch.equal(output_of(model, batch_of("mlp")), output_of(dense, batch_of("mlp")))


def add_in_place(model: nn.Module) -> None:
    nudge(model)


def load(model: nn.Module) -> None:
    state = {name: torch.randn_like(p) for name, p in model.named_parameters() if name.endswith("_delta")}
    model.load_state_dict(state, strict=False)


def assign(model: nn.Module) -> None:
    state = {name: torch.randn_like(p) for name, p in model.named_parameters() if name.endswith("_delta")}
    model.load_state_dict(state, strict=False, assign=True)


def set_data_and_tell(model: nn.Module) -> None:
    for weight in model.sparsity.weights.values():
        weight.delta.data = torch.randn_like(weight.delta)
        weight.invalidate()


@pytest.mark.parametrize("change", [add_in_place, load, assign, set_data_and_tell])
def test_deltas_that_are_set_are_seen_by_the_next_forward(change):
    base, model = both("mlp")
    output_of(model, batch_of("mlp"))
    change(model)
    dense = dense_copy(base, model)
    assert torch.equal(output_of(model, batch_of("mlp")), output_of(dense, batch_of("mlp")))


def test_a_copied_model_holds_no_reference_to_what_stage_3_has_gathered():
    _, model = both("mlp")
    for weight in model.sparsity.weights.values():
        weight.refresh_copy(weight.setting)
        # Its destructor would free memory that the other still refers to
        assert copy.deepcopy(weight)._copy_written is None is not weight._copy_written


@pytest.mark.parametrize("assign", [False, True])
def test_base_weights_that_are_loaded_get_the_deltas(assign):
    base, model = both("mlp")
    nudge(model)
    expected = output_of(model, batch_of("mlp"))
    model.load_state_dict(copy.deepcopy(base).state_dict(), strict=False, assign=assign)
    assert torch.equal(output_of(model, batch_of("mlp")), expected)


def test_a_state_dict_restores_a_trained_model():
    _, model = both("bert")
    train(model, batches("bert", 3))
    _, other = both("bert")
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(other, batch_of("bert")), output_of(model, batch_of("bert")))
    assert_same_bits(plain_state(unload(other)), plain_state(unload(model)))


# An optimizer step between forward and backward


def test_a_graph_from_before_the_weights_changed_is_refused():
    _, model = both("mlp")
    loss = loss_of(model, batch_of("mlp"))
    train(model, batches("mlp", 1))
    output_of(model, batch_of("mlp"))
    with pytest.raises(UserError, match="its deltas have changed between a forward and the backward"):
        loss.backward()


def test_the_step_of_another_models_optimizer_disturbs_nothing():
    base, model = both("mlp")
    critic = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)

    def backward(model: nn.Module) -> None:
        output = output_of(model, batch_of("mlp"))
        critic(output.detach()).sum().backward()
        optimizer.step()
        output.square().sum().backward()

    assert_gradients(model, base, backward)


# Copies


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_trains_on_its_own(copied):
    _, model = both("bert")
    train(model, batches("bert", 2))
    before = output_of(model, batch_of("bert"))
    twin, other = copied(model), copied(model)
    losses = train(twin, batches("bert", 3, seed=1))
    assert torch.equal(output_of(model, batch_of("bert")), before)
    assert losses == train(model, batches("bert", 3, seed=1))
    assert torch.equal(output_of(twin, batch_of("bert")), output_of(model, batch_of("bert")))
    assert torch.equal(output_of(other, batch_of("bert")), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_sees_deltas_that_the_original_has_not_written_yet(copied):
    base, model = both("mlp")
    output_of(model, batch_of("mlp"))
    nudge(model)
    twin = copied(model)
    dense = dense_copy(base, model)
    assert torch.equal(output_of(twin, batch_of("mlp")), output_of(dense, batch_of("mlp")))


def test_a_pickled_copy_notices_optimizers():
    base, model = both("mlp")
    twin = through_pickle(model)
    loss_of(twin, batch_of("mlp")).backward()
    DataSGD(trainable(twin)).step()
    dense = dense_copy(base, twin)
    assert torch.equal(output_of(twin, batch_of("mlp")), output_of(dense, batch_of("mlp")))
