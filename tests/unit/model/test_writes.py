"""Writing the deltas of many weights at once: what is due, and what is noted."""

import copy

import pytest
import torch
from families import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero import SparseConfig, UserError, load_adapter, refresh, save_adapter, set_adapter, sparsify
from sparse_zero.gradient import cpu
from sparse_zero.model import writes

assert cpu.load_operator() is not None


class Layer:
    """A weight of which something is due once."""

    def __init__(self, is_new: bool = True):
        self.values, self.is_new, self.seen = torch.zeros(2), is_new, []

    def due(self, in_forward, checks_data):
        self.seen.append(("due", in_forward, checks_data, torch.is_grad_enabled()))
        return writes.Due(self, self.values, "setting", self.is_new) if len(self.seen) == 1 else None

    def operands(self, values, setting):
        return None

    def write_values(self, values, setting):
        self.seen.append(("written", torch.is_grad_enabled()))

    def note_written(self, setting):
        self.seen.append(("noted", setting))


@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_due_is_decided_in_the_callers_gradient_mode(gradients):
    """On a GPU, deltas that were changed without autograd are written in forwards with gradients only."""
    layer = Layer()
    with torch.set_grad_enabled(gradients):
        writes.refresh([layer], in_forward=True, checks_data=True)
        writes.refresh([layer])
        assert torch.is_grad_enabled() == gradients
    assert layer.seen == [
        ("due", True, True, gradients), ("written", False), ("noted", "setting"), ("due", False, False, gradients),
    ]  # fmt: skip


def test_a_write_to_be_sure_is_not_noted():
    layer = Layer(is_new=False)
    writes.refresh([layer])
    assert [each[0] for each in layer.seen] == ["due", "written"]


def layers(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32, torch.bfloat16)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16).to(dtype) for dtype in dtypes))


def calls(function) -> list[tuple[str, int]]:
    """The calls of our writing operators, and how many weights each writes."""
    found = []

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("sparse_zero::write"):
                found.append((func.name(), len(args[0]) if isinstance(args[0], list) else 1))
            return func(*args, **(kwargs or {}))

    with Noting():
        function()
    return found


def test_a_step_writes_all_weights_of_a_dtype_in_one_call_and_a_forward_none():
    model = sparsify(layers((torch.float32,) * 4), SparseConfig(density=0.2, targets="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = torch.randn(3, 16)
    model(batch).sum().backward()
    assert calls(optimizer.step) == [("sparse_zero::write_all_deltas", 4)]
    assert calls(lambda: model(batch)) == []


def test_the_step_of_another_models_optimizer_writes_nothing_unless_the_deltas_have_changed():
    """DeepSpeed's optimizers have flat buffers: that one of them has changed the deltas can only be seen in these."""
    model = sparsify(layers((torch.float32,) * 2), SparseConfig(density=0.2, targets="all-linear"))
    other = torch.nn.Parameter(torch.ones(3))
    optimizer, batch = torch.optim.SGD([other], lr=0.1), torch.randn(3, 16)
    other.sum().backward()
    model(batch)
    optimizer.step()
    assert calls(lambda: model(batch)) == []
    first, second = model.sparsity.weights.values()
    optimizer.step()
    second.delta.data.normal_()
    assert calls(lambda: model(batch)) == [("sparse_zero::write_all_deltas", 1)]
    expected = second.base + second.delta.detach()
    assert torch.equal(second.values_at_positions(), expected)
    assert torch.equal(first.values_at_positions(), first.base)


def test_weights_of_several_dtypes_and_settings_are_written_right():
    plain = layers()
    model = sparsify(copy.deepcopy(plain), SparseConfig(density=0.2, targets="all-linear"))
    first, second, third = model.sparsity.weights.values()
    for weight in (first, second, third):
        weight.delta.data.normal_()
    second.scale = 0.5  # a factor: written by itself
    found = calls(lambda: refresh(model))
    assert sorted(found) == [
        ("sparse_zero::write_all_deltas", 1), ("sparse_zero::write_all_deltas", 1), ("sparse_zero::write_deltas", 1),
    ]  # fmt: skip
    for (name, weight), factor in zip(model.sparsity.weights.items(), (1, 0.5, 1), strict=True):
        expected, flat = plain.get_parameter(name).detach().clone().view(-1), weight.flat_positions()
        expected[flat] = (expected[flat].float() + factor * weight.delta.detach()).to(expected.dtype)
        assert torch.equal(weight.weight.view(-1), expected)


def test_disabled_weights_are_restored_in_one_call():
    plain = layers((torch.float32,) * 3)
    model = sparsify(copy.deepcopy(plain), SparseConfig(density=0.2, targets="all-linear"))
    for weight in model.sparsity.weights.values():
        weight.delta.data.normal_()
    refresh(model)
    assert calls(lambda: model.sparsity.disable(model)) == [("sparse_zero::write_all_deltas", 3)]
    assert all(torch.equal(model.get_parameter(n), p) for n, p in plain.named_parameters())


class Experts(nn.Module):
    """Their inputs are in the rows."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 16, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [0.5, "whole"])
def test_weights_with_drawn_columns_are_written_in_one_call_with_the_bits_of_single_writes(columns, dtype):
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Linear(16, 8), Conv1D(12, 8), Experts()]).to(dtype)
    config = SparseConfig(density=0.2, targets=["0", "1", "2.up_proj"], columns=columns, dropout=0.5)
    model = sparsify(copy.deepcopy(plain), config)
    weights = model.sparsity.weights.values()
    for weight in weights:
        weight.delta.data.normal_()

    def is_written(together: bool) -> bool:
        """Whether the weights are written, and each as by itself."""
        expected = {weight: weight.weight.detach().clone() for weight in weights}
        for weight, values in expected.items():
            weight.write_values(values, weight.at_rest)
        assert [call for call in calls(lambda: refresh(model)) if "all_columns" in call[0]] == [
            ("sparse_zero::write_all_columns", 3)
        ] * together
        return all(torch.equal(weight.weight, values) for weight, values in expected.items())

    assert is_written(together=True)
    assert not any(torch.equal(model.get_parameter(n), p) for n, p in plain.named_parameters() if p.dim() > 1)
    for weight in weights:
        assert weight.operands(weight.weight.detach(), weight.at_rest._replace(dropout_step=3)) is None
        weight.scale = 0.5
    assert is_written(together=False)
    for weight in weights:
        weight.scale, weight.enabled = 1.0, False
    assert is_written(together=True)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in plain.named_parameters())
    for weight in weights:
        weight.reference, weight.shows_reference = torch.randn_like(weight.base), True
    assert is_written(together=True)
    for weight in weights:
        assert torch.equal(weight.values_at_positions(), weight.reference)


def test_adapters_in_columns_that_replace_each_other(tmp_path):
    """Of each adapter the weights are those of the adapter alone."""
    torch.manual_seed(0)
    base, alone = tiny("gpt2"), {}
    for seed, columns in ((1, "whole"), (2, 0.25), (3, 1)):
        config = SparseConfig(density=0.1, targets="all-linear", columns=columns, seed=seed)
        model = sparsify(copy.deepcopy(base), config)
        for weight in model.sparsity.weights.values():
            weight.delta.data.normal_()
        refresh(model)
        save_adapter(model, tmp_path / str(seed))
        alone[str(seed)] = {name: weight.weight.detach().clone() for name, weight in model.sparsity.weights.items()}
    model = copy.deepcopy(base)
    for name in alone:
        load_adapter(model, tmp_path / name, adapter_name=name)
    for name in ("1", "2", "3", "1", "3", "2"):
        set_adapter(model, name)
        assert all(torch.equal(model.get_parameter(n), values) for n, values in alone[name].items()), name


def test_a_weight_without_values_is_named():
    model = sparsify(layers(), SparseConfig(density=0.2, targets="all-linear"))
    model[1].to("meta")
    for weight in model.sparsity.weights.values():
        weight.invalidate()
    with pytest.raises(UserError, match=r"1\.weight"):
        writes.refresh(model.sparsity.weights.values())
