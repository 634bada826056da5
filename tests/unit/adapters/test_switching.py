"""Several adapters on one model, reversible merging, and scaling."""

import copy

import pytest
import torch
from families import tiny
from sparse_cases import adamw, assert_same_bits, plain_state, trainable
from torch import nn

from sparse_zero import (
    SparseConfig,
    UserError,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    set_scale,
    sparsify,
    unload,
    unmerge_adapter,
)
from sparse_zero.adapters.switching import adapter_names

TOKENS = torch.tensor([[3, 4, 5, 9], [7, 3, 95, 94]])
CONFIGS = {
    "first": SparseConfig(density=0.06, seed=1),
    "second": SparseConfig(density=0.03, targets=["up_proj", "*.bias", "norm"], granularity=1, seed=2),
    "third": SparseConfig(density=0.05, targets="all", selection="magnitude"),
}


def base_of(dtype: torch.dtype = torch.float32, task: str = "sequence-classification") -> nn.Module:
    return tiny("qwen2", task, pad_token_id=0).to(dtype).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trained(config: SparseConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = sparsify(base_of(dtype), config)
    optimizer = adamw(trainable(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def saved(request, tmp_path_factory):
    """The dtype, and for each adapter its directory and its logits."""
    found = {}
    for name, config in CONFIGS.items():
        model = trained(config, request.param)
        directory = tmp_path_factory.mktemp(name)
        save_adapter(model, directory)
        found[name] = directory, logits(model)
    return request.param, found


def with_all(saved) -> nn.Module:
    dtype, found = saved
    model = base_of(dtype)
    for name, (directory, _) in found.items():
        load_adapter(model, directory, adapter_name=name)
    return model


def test_switching_gives_the_logits_of_each_adapter(saved):
    dtype, found = saved
    base, model = base_of(dtype), with_all(saved)
    assert adapter_names(model) == ["first", "second", "third"]
    for name in ("first", "third", "second", "third", "first", "first"):
        set_adapter(model, name)
        assert adapter_names(model)[0] == name
        assert torch.equal(logits(model), found[name][1]), name
        with disable_adapter(model):
            assert torch.equal(logits(model), logits(base))
    assert_same_bits(plain_state(unload(model)), plain_state(base))


def test_what_was_trained_after_a_switch_is_kept_over_the_next(saved):
    _, found = saved
    model = with_all(saved)
    set_adapter(model, "second")
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    after = logits(model)
    assert not torch.equal(after, found["second"][1])
    set_adapter(model, "first")
    assert torch.equal(logits(model), found["first"][1])
    set_adapter(model, "second")
    assert torch.equal(logits(model), after)


def test_adapters_can_be_deleted(saved):
    model = with_all(saved)
    delete_adapter(model, "second")
    assert adapter_names(model) == ["first", "third"]
    with pytest.raises(UserError, match="the model has no adapter 'second'; its adapters: first, third"):
        set_adapter(model, "second")
    with pytest.raises(UserError, match="the model has no adapter 'thrid'; did you mean 'third'"):
        delete_adapter(model, "thrid")
    with pytest.raises(UserError, match="'first' is the active adapter"):
        delete_adapter(model, "first")


def test_an_adapter_of_another_base_is_refused_beside_others(saved):
    dtype, found = saved
    other = base_of(dtype)
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.down_proj.weight").add_(1)
    model = sparsify(other, CONFIGS["first"])
    with pytest.raises(UserError, match="this model has different weights"):
        load_adapter(model, found["second"][0], adapter_name="second")
    assert adapter_names(model) == ["default"]


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_and_unmerge_are_bit_exact(saved, name):
    dtype, found = saved
    base = base_of(dtype)
    model = load_adapter(base_of(dtype), found[name][0])
    merge_adapter(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(logits(model), found[name][1])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    unmerge_adapter(model)
    assert torch.equal(logits(model), found[name][1])
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
    assert_same_bits(plain_state(unload(model)), plain_state(base))


def test_there_is_nothing_to_unmerge(saved):
    with pytest.raises(UserError, match="nothing to unmerge"):
        unmerge_adapter(with_all(saved))


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_scaling(scale):
    base, model = base_of(), trained(SparseConfig(density=0.05, modules_to_save=[]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.sparsity.weights.values():
            weight.delta.mul_(scale)
    set_scale(model, scale)
    assert torch.equal(logits(model), logits(twin))
    if scale == 0:
        assert torch.equal(logits(model), logits(base))
    for each in (model, twin):
        each.zero_grad()
        each(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    for one, other in zip(trainable(model), trainable(twin), strict=True):
        # dL/d(delta) = scale * dL/dW
        torch.testing.assert_close(one.grad, scale * other.grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(logits(merge_and_unload(model)), logits(merge_and_unload(twin)))


def test_an_adapter_that_was_active_follows_other_base_weights(tmp_path):
    """They are loaded while it is inactive: it must not bring back scalars of the weights before."""
    base, other = mlp(0), mlp(9)
    model = sparsify(copy.deepcopy(base), SparseConfig(density=0.2, targets="all-linear"))
    second = sparsify(copy.deepcopy(base), SparseConfig(density=0.2, targets="all-linear", seed=1))
    save_adapter(second, tmp_path)
    load_adapter(model, tmp_path, "second")
    set_adapter(model, "second")
    model.load_state_dict(other.state_dict(), strict=False)
    set_adapter(model, "default")
    x = torch.randn(3, 6)
    assert torch.equal(model(x), other(x))
    assert torch.equal(unload(model)(x), other(x))


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
