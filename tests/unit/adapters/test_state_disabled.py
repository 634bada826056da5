"""Within `disable_adapter`, and over merging and switching, nothing is lost: values, scale, and what was refused."""

import contextlib
import copy

import pytest
import torch
from sparse_cases import drawn, trainable
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
    UserError,
    adapter_names,
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

BASE = output(mlp())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two directories, and what the models must compute."""
    found = {}
    for index, name in enumerate("ab"):
        model = with_head(seed=index)
        directory = saved(model, tmp_path_factory.mktemp(name))
        found[name] = directory, output(dense_with_head(model))
        assert torch.equal(output(model), found[name][1])
    return found


def both(adapters) -> nn.Module:
    model = load_adapter(mlp(), adapters["a"][0], "a")
    return load_adapter(model, adapters["b"][0], "b")


@pytest.mark.parametrize("nested", [1, 2, 3])
def test_save_adapter_within(adapters, nested, tmp_path):
    model = load_adapter(mlp(), adapters["a"][0])
    with contextlib.ExitStack() as stack:
        for _ in range(nested):
            stack.enter_context(disable_adapter(model))
        save_adapter(model, tmp_path / "adapter")
        assert torch.equal(output(model), BASE)
    assert torch.equal(output(load_adapter(mlp(), tmp_path / "adapter")), adapters["a"][1])
    assert torch.equal(output(model), adapters["a"][1])


@pytest.mark.parametrize("nested", [1, 2, 3])
def test_load_adapter_within(adapters, nested):
    model = sparsify(mlp(), HEAD)
    with contextlib.ExitStack() as stack:
        for _ in range(nested):
            stack.enter_context(disable_adapter(model))
        load_adapter(model, adapters["a"][0])
        assert torch.equal(output(model), BASE)
    assert torch.equal(output(model), adapters["a"][1])


@pytest.mark.parametrize("nested", [1, 2])
def test_set_adapter_within(adapters, nested):
    model = both(adapters)
    with contextlib.ExitStack() as stack:
        for _ in range(nested):
            stack.enter_context(disable_adapter(model))
        for name in "babab":
            set_adapter(model, name)
            assert torch.equal(output(model), BASE)
    assert torch.equal(output(model), adapters["b"][1])
    set_adapter(model, "a")
    assert torch.equal(output(model), adapters["a"][1])
    assert torch.equal(output(unload(model)), BASE)


@pytest.mark.parametrize("nested", [1, 2])
@pytest.mark.parametrize("take_off", [unload, merge_and_unload, merge_adapter])
def test_taking_off_within(adapters, take_off, nested):
    model = both(adapters)
    expected = BASE if take_off is unload else adapters["a"][1]
    with contextlib.ExitStack() as stack:
        for _ in range(nested):
            stack.enter_context(disable_adapter(model))
        take_off(model)
        assert torch.equal(output(model), expected)
    assert torch.equal(output(model), expected)
    if take_off is merge_adapter:
        unmerge_adapter(model)
        assert torch.equal(output(model), adapters["a"][1])
        with disable_adapter(model):
            assert torch.equal(output(model), BASE)


def test_load_a_second_adapter_and_delete_one_within(adapters):
    model = load_adapter(mlp(), adapters["a"][0], "a")
    with disable_adapter(model):
        load_adapter(model, adapters["b"][0], "b")
        set_adapter(model, "b")
        delete_adapter(model, "a")
    assert adapter_names(model) == ["b"]
    assert torch.equal(output(model), adapters["b"][1])


@pytest.mark.parametrize("way", ["error", "return", "generator"])
def test_the_adapter_is_back_however_the_block_ends(adapters, way):
    model = load_adapter(mlp(), adapters["a"][0])

    def look() -> torch.Tensor:
        with disable_adapter(model):
            return output(model)

    def steps():
        with disable_adapter(model):
            yield output(model)

    if way == "error":
        with contextlib.suppress(KeyError), disable_adapter(model), disable_adapter(model):
            raise KeyError
    elif way == "return":
        assert torch.equal(look(), BASE)
    else:
        iterator = steps()
        assert torch.equal(next(iterator), BASE)
        iterator.close()
    assert torch.equal(output(model), adapters["a"][1])


@pytest.mark.parametrize("how", ["loaded", "switched within"])
def test_a_loss_of_the_base_has_no_gradient_for_the_adapter(adapters, how):
    """As in PEFT, whose fully trained modules are copies of frozen ones."""
    model = both(adapters)
    with disable_adapter(model):
        if how == "switched within":
            set_adapter(model, "b")
            set_adapter(model, "a")
        y = model(X)
        assert torch.equal(y, BASE)
        assert not y.requires_grad
    (model(X) - y).square().sum().backward()
    plain = dense_with_head(model)
    (plain(X) - BASE).square().sum().backward()
    for module, name in ((2, "weight"), (2, "bias")):
        torch.testing.assert_close(getattr(model[module], name).grad, getattr(plain[module], name).grad)
    for name, flat in drawn(model).items():
        torch.testing.assert_close(
            model.sparsity.weights[name].delta.grad, plain.get_parameter(name).grad.flatten()[flat]
        )


def test_a_fully_trained_parameter_that_the_user_froze_stays_frozen(adapters):
    model = load_adapter(mlp(), adapters["a"][0])
    model[2].bias.requires_grad_(False)
    with disable_adapter(model):
        pass
    assert not model[2].bias.requires_grad
    assert model[2].weight.requires_grad


def test_a_backward_over_a_block_with_fully_trained_modules(adapters):
    """DPO's order. Their values change in place and are put back, with autograd's version counters."""
    model, apart = load_adapter(mlp(), adapters["a"][0]), load_adapter(mlp(), adapters["a"][0])
    for net, block in ((model, disable_adapter(model)), (apart, contextlib.nullcontext())):
        loss = net(X).square().sum()
        with block, torch.no_grad():
            net(X)
        loss.backward()
    for one, other in zip(trainable(model), trainable(apart), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_backward_within_the_block_is_refused(adapters):
    model = load_adapter(mlp(), adapters["a"][0])
    loss = model(X).square().sum()
    with disable_adapter(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_within_is_warned_of(adapters, caplog):
    """It would change the original values of fully trained modules, which are in the model then."""
    model = load_adapter(mlp(), adapters["a"][0])
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    model(X).square().sum().backward()
    with disable_adapter(model):
        optimizer.step()
    assert "changed within disable_adapter" in caplog.text


@pytest.mark.xfail(strict=True, reason="autograd drops gradients of parameters that are frozen when backward runs")
def test_a_backward_within_of_a_fully_trained_first_layer():
    model = sparsify(mlp(), SparseConfig(density=0.9, targets=["2.weight"], modules_to_save=["0"]))
    y = model(X).square().sum()
    with disable_adapter(model):
        y.backward()
    assert model[0].weight.grad is not None


def test_a_scale_is_kept_over_merging():
    model = sparse_mlp()
    set_scale(model, 0.5)
    expected = output(model)
    for _ in range(2):
        merge_adapter(model)
        assert torch.equal(output(model), expected)
        unmerge_adapter(model)
        assert torch.equal(output(model), expected)
    set_scale(model, 1)
    assert torch.equal(output(model), output(dense(model)))


def test_each_adapter_keeps_its_scale_over_switching(tmp_path):
    saved(sparse_mlp(), tmp_path / "a")
    saved(sparse_mlp(seed=1), tmp_path / "b")
    model = load_adapter(load_adapter(mlp(), tmp_path / "a", "a"), tmp_path / "b", "b")
    found = {}
    for name, scale in (("a", 0.5), ("b", 2.0)):
        set_adapter(model, name)
        whole = output(model)
        set_scale(model, scale)
        found[name] = output(model)
        assert not torch.equal(found[name], whole)
    for name in "abba":
        set_adapter(model, name)
        assert torch.equal(output(model), found[name])
        with disable_adapter(model):
            assert torch.equal(output(model), BASE)
        assert torch.equal(output(model), found[name])


def test_a_merged_model_that_was_made_sparse_again(tmp_path):
    model = load_adapter(mlp(), saved(sparse_mlp(), tmp_path / "a"))
    merge_adapter(model)
    merged = output(model)
    sparsify(model, CONFIG.model_copy(update={"seed": 9}))
    with pytest.raises(UserError, match="sparse already"):
        unmerge_adapter(model)
    assert torch.equal(output(model), merged)
    assert torch.equal(output(unload(model)), merged)
    unmerge_adapter(model)
    assert torch.equal(output(unload(model)), BASE)


def test_a_refused_switch_leaves_the_active_adapter(tmp_path):
    """An inactive adapter is forgotten with the base that it belongs to."""
    model = load_adapter(mlp(), saved(sparse_mlp(), tmp_path / "a"), "a")
    load_adapter(model, saved(sparse_mlp(seed=1), tmp_path / "b"), "b")
    merge_and_unload(model)
    base = copy.deepcopy(model)
    sparsify(model, CONFIG)
    assert adapter_names(model) == ["default"]
    with torch.no_grad():
        for delta in deltas(model):
            delta.fill_(0.5)
    expected = output(dense(model, base))
    for name in ("b", 3):
        with pytest.raises(UserError):
            set_adapter(model, name)
        assert torch.equal(output(model), expected)
    assert adapter_names(model) == ["default"]


def test_merging_what_is_not_finite_is_refused_within_too(adapters):
    model = load_adapter(mlp(), adapters["a"][0])
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    for _ in range(2):
        with disable_adapter(model):
            with pytest.raises(UserError, match="NaN or infinite"):
                merge_and_unload(model)
            assert torch.equal(output(model), BASE)
    assert output(model).isnan().any()
