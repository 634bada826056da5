"""Disabling the adapter, unloading and merging."""

import contextlib
import copy
import gc

import pytest
import torch
from sparse_cases import (
    CASES,
    adamw,
    assert_same_bits,
    base_model,
    batch_of,
    batches,
    both,
    dense_copy,
    drawn,
    loss_of,
    nudge,
    output_of,
    plain_state,
    train,
    train_reference,
    trainable,
)
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

from sparse_zero.model.layers import SparseModule
from sparse_zero.model.sparsify import disable_adapter, merge_and_unload, sparsify, unload
from sparse_zero.model.step_counter import _COUNTERS


@pytest.mark.parametrize("case", ["mlp", "llama", "gpt2"])
def test_disable_adapter_gives_the_base_model_and_comes_back(case):
    base, model = both(case)
    train(model, batches(case, 3))
    batch = batch_of(case)
    adapted = output_of(model, batch)
    with disable_adapter(model):
        assert torch.equal(output_of(model, batch), output_of(base, batch))
        with disable_adapter(model):
            pass
        assert torch.equal(output_of(model, batch), output_of(base, batch))
    assert torch.equal(output_of(model, batch), adapted)
    assert not torch.equal(adapted, output_of(base, batch))


def test_an_error_while_disabled_enables_again():
    _, model = both("mlp")
    nudge(model)
    adapted = output_of(model, batch_of("mlp"))
    with contextlib.suppress(KeyError), disable_adapter(model):
        output_of(model, batch_of("mlp"))
        raise KeyError
    assert torch.equal(output_of(model, batch_of("mlp")), adapted)


def test_training_goes_on_after_a_look_at_the_base_model():
    base, model = both("mlp")
    selected = drawn(model)
    optimizer, losses = adamw(trainable(model)), []
    for batch in batches("mlp", 5):
        with disable_adapter(model), torch.no_grad():
            output_of(model, batch)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(losses, train_reference(base, selected, [], batches("mlp", 5)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_unload_gives_every_weight_back_bit_for_bit(case, dtype):
    base = base_model(case).to(dtype)
    model = sparsify(copy.deepcopy(base), CASES[case])
    train(model, batches(case, 5))
    output_of(model, batch_of(case))
    trained = plain_state(model)
    assert any(not torch.equal(trained[name], tensor) for name, tensor in base.state_dict().items())
    assert_same_bits(plain_state(unload(model)), plain_state(base))


@pytest.mark.parametrize("take_off", [unload, merge_and_unload])
@pytest.mark.parametrize("case", CASES)
def test_nothing_of_ours_is_left(case, take_off):
    base, model = both(case)
    train(model, batches(case, 1))
    plain = take_off(model)
    assert plain is model
    assert not any(isinstance(module, SparseModule) for module in plain.modules())
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert [name for name, _ in plain.named_buffers()] == [name for name, _ in base.named_buffers()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(plain.modules(), base.modules(), strict=True))
    assert all(p.requires_grad for p in plain.parameters())
    sparsify(plain, CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_what_the_sparse_one_does(case):
    base, model = both(case)
    train(model, batches(case, 3))
    # Merged directly after a step: no forward has written the deltas yet
    dense, head = dense_copy(base, model), {name: model.get_parameter(name) for name in model.sparsity.whole}
    dense.load_state_dict(head, strict=False)
    expected = output_of(copy.deepcopy(model), batch_of(case))
    merged = merge_and_unload(model)
    assert torch.equal(output_of(merged, batch_of(case)), expected)
    assert_same_bits(plain_state(merged), plain_state(dense))


def test_the_counters_of_optimizer_steps_go_with_the_model():
    gc.collect()
    before = len(_COUNTERS)
    models = [both("mlp")[1] for _ in range(3)]
    hooks = len(_global_optimizer_post_hooks)
    assert len(_COUNTERS) == before + 3
    unload(models[0])
    del models
    gc.collect()
    assert len(_COUNTERS) == before
    assert len(_global_optimizer_post_hooks) == hooks


def test_a_model_that_is_collected_within_a_step():
    """Torch iterates over its hooks then."""
    dropped = []

    def collect(*_: object) -> None:
        dropped.clear()
        gc.collect()

    # Hooks of models that are registered now come after it
    hook = register_optimizer_step_post_hook(collect)
    (_, model), (_, other) = both("mlp"), both("mlp")
    optimizer = adamw(trainable(model))
    dropped.append(other)
    del other
    try:
        loss_of(model, batch_of("mlp")).backward()
        optimizer.step()
    finally:
        hook.remove()
    assert torch.equal(model[0]._parameters["weight"], dense_copy(base_model("mlp"), model)[0].weight)
