"""sparsify, and training a sparse model."""

import copy

import pytest
import torch
from families import tiny
from sparse_cases import (
    CASES,
    LEARNING_RATE,
    assert_gradients,
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
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.gradient import cpu
from sparse_zero.model.sparsify import apply_selection, merge_and_unload, sparsify
from sparse_zero.selection.config import SparseConfig

# The sparse model


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_model_computes_what_the_base_model_does(case):
    base, model = both(case)
    assert torch.equal(output_of(model, batch_of(case)), output_of(base, batch_of(case)))


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_density_is_trainable(case):
    base, model = both(case)
    total = sum(p.numel() for p in base.parameters())
    assert sum(p.numel() for p in trainable(model)) == round(CASES[case].density * total)
    assert model.sparsity.total_parameters == total
    assert model.sparsity.trainable_parameters == round(CASES[case].density * total)


def test_the_trainable_parameters_are_the_deltas_and_the_head():
    _, model = both("bert")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"bert.encoder.layer.{i}.attention.{end}" for i in (0, 1) for end in ("self.value", "output.dense")]
    assert names == {*(f"{layer}.weight_delta" for layer in layers), "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("case", CASES)
def test_the_state_dict_keeps_the_names_of_the_base_model(case):
    base, model = both(case)
    added = {f"{name}_{kind}" for name in model.sparsity.weights for kind in ("delta", "base", "positions")}
    assert set(model.state_dict()) == {*base.state_dict(), *added}


def test_a_sparse_model_is_refused():
    _, model = both("mlp")
    with pytest.raises(UserError, match="sparse already"):
        sparsify(model, CASES["mlp"])


# Training


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_adamw_equal_masked_dense_training(case):
    base, model = both(case)
    selected, before = drawn(model), plain_state(base)
    losses = train(model, batches(case, 20))
    expected = train_reference(base, selected, model.sparsity.whole, batches(case, 20))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    output_of(model, batch_of(case))
    after, reference = plain_state(model), plain_state(base)
    for name in before:
        torch.testing.assert_close(after[name], reference[name], rtol=0, atol=1e-6)
    moved = sum((after[name] - before[name]).abs().gt(LEARNING_RATE).sum() for name in selected)
    assert moved > 0.5 * model.sparsity.selected_parameters, "too little training for a comparison"


@pytest.mark.parametrize("case", CASES)
def test_only_selected_scalars_move(case):
    base, model = both(case)
    train(model, batches(case, 5))
    output_of(model, batch_of(case))
    before, after = plain_state(base), plain_state(model)
    for name, flat in drawn(model).items():
        assert (before[name].flatten()[flat] != after[name].flatten()[flat]).float().mean() > 0.9
        before[name].view(-1)[flat] = after[name].view(-1)[flat] = 0
    frozen = [name for name in before if name not in model.sparsity.whole]
    assert_same_bits({name: before[name] for name in frozen}, {name: after[name] for name in frozen})


@pytest.mark.parametrize("case", CASES)
def test_no_frozen_weight_ever_has_a_gradient(case):
    _, model = both(case)
    for _ in range(2):
        train(model, batches(case, 1))
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


class DenseGradients(TorchDispatchMode):
    """Keeps weak references to all storages of one size that are allocated while it is active."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if isinstance(output, torch.Tensor) and output.layout == torch.strided and output.numel() == self.numel:
            known = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
            if output.untyped_storage().data_ptr() not in known:
                self.made.append(StorageWeakRef(output.untyped_storage()))
        return output

    def alive(self) -> int:
        return sum(not reference.expired() for reference in self.made)


def dense_gradients_left(model: nn.Sequential) -> tuple[int, int]:
    """The number of dense gradients of the last weight that were allocated, and of those that were still allocated
    when the gradient reached the layer before."""
    activation = model[:-1](torch.randn(8, 96))
    left = []
    watch = DenseGradients(model[-1].weight.numel())
    activation.register_hook(lambda gradient: left.append(watch.alive()))
    loss = model[-1](activation).square().sum()
    with watch:
        loss.backward()
    return len(watch.made), left[0]


def test_no_dense_gradient_outlives_the_backward_of_its_layer():
    base = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 248))
    assert dense_gradients_left(copy.deepcopy(base)) == (1, 1), "the watch sees an ordinary model's gradient"
    config = SparseConfig(density=0.3, targets="all-linear")
    made, left = dense_gradients_left(sparsify(copy.deepcopy(base), config))
    assert made > 0, "dense enough for the dense product"
    assert left == 0
    made, left = dense_gradients_left(sparsify(base, config.model_copy(update={"density": 0.05})))
    assert (made, left) == (0, 0)


@pytest.mark.parametrize("case", CASES)
def test_two_forwards_before_one_backward(case):
    base, model = both(case)
    nudge(model)

    def backward(model: nn.Module) -> None:
        first, second = (loss_of(model, batch) for batch in batches(case, 2))
        (first + 2 * second).backward()

    assert_gradients(model, dense_copy(base, model), backward)


@pytest.mark.parametrize("case", CASES)
def test_gradients_accumulate(case):
    base, model = both(case)
    nudge(model)

    def backward(model: nn.Module) -> None:
        for batch in batches(case, 3):
            loss_of(model, batch).backward()

    assert_gradients(model, dense_copy(base, model), backward)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing(case, reentrant):
    base, model = both(case)
    nudge(model)
    dense = dense_copy(base, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_gradients(model, dense, lambda model: loss_of(model, batch_of(case)).backward())


def test_gradient_checkpointing_over_several_steps():
    # The recomputation in backward uses the weights of the forward, never those of another step
    base, model = both("llama")
    selected = drawn(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = train(model, batches("llama", 5))
    torch.testing.assert_close(losses, train_reference(base, selected, [], batches("llama", 5)), rtol=0, atol=1e-6)


def test_bfloat16_weights_get_float32_gradients():
    base = base_model("mlp").bfloat16()
    model = sparsify(copy.deepcopy(base), CASES["mlp"])
    batch = {name: tensor.bfloat16() for name, tensor in batch_of("mlp").items()}
    products = {}

    def keep_product(layer: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: products.update({layer: gradient.double().t() @ inputs[0].double()}))

    for layer in base:
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(keep_product)
    loss_of(base, batch).backward()
    loss_of(model, batch).backward()
    for name, flat in drawn(model).items():
        gradient = model.sparsity.weights[name].delta.grad
        assert gradient.dtype == torch.float32
        expected = products[base.get_submodule(name.removesuffix(".weight"))].flatten()[flat].float()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_weights_hold_the_rounded_sum_of_float32():
    base = base_model("mlp").bfloat16()
    model = sparsify(copy.deepcopy(base), CASES["mlp"])
    nudge(model)
    dense = dense_copy(base, model)
    inputs = batch_of("mlp")["input"].bfloat16()
    assert torch.equal(model(inputs), dense(inputs))
    assert_same_bits(plain_state(model), plain_state(dense))


def test_bfloat16_weights_take_up_many_small_steps():
    # bfloat16 has no number between 1 and 1.0078, so steps of 0.001 would be lost in the weight itself
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    nn.init.ones_(model[0].weight)
    sparsify(model, SparseConfig(density=0.3, targets="all-linear"))
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    for _ in range(20):
        for parameter in trainable(model):
            parameter.grad = torch.full_like(parameter, -0.001)
        optimizer.step()
        model(torch.ones(1, 8, dtype=torch.bfloat16))
    selected = model[0].weight.flatten()[drawn(model)["0.weight"]]
    assert torch.equal(selected, torch.full_like(selected, 1.02))


def test_autocast():
    base, model = both("mlp")
    nudge(model)

    def backward(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch_of("mlp"))
        loss.backward()

    # The dense gradient is rounded to bfloat16, 8 bits; ours is summed in float32.
    assert_gradients(model, dense_copy(base, model), backward, rtol=2**-7, atol=1e-4)
    assert all(weight.delta.grad.dtype == torch.float32 for weight in model.sparsity.weights.values())


@pytest.mark.parametrize("read", [False, True], ids=["layer", "reader"])
def test_under_autocast_the_input_is_kept_in_half_precision(read):
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).float() + 1  # kept by nobody else
            return (nn.functional.linear(x, self.second.weight) if read else self.second(x)) + self.third(x)

    model = sparsify(Layers(), SparseConfig(density=0.5, targets="all-linear"))
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(3, 64))
    batches = [tensor for tensor in kept if tensor.shape == (3, 64)]
    assert {tensor.dtype for tensor in batches} == {torch.bfloat16}
    # One of the first layer's input, and one that the second and the third layer share
    assert len({tensor.data_ptr() for tensor in batches}) == 2


@pytest.mark.parametrize(
    ("plain", "name", "value"),
    [
        (nn.Linear(8, 8), "input", torch.randn(3, 8)),
        (nn.Embedding(8, 8), "input", torch.arange(8)),
        (Conv1D(8, 8), "x", torch.randn(3, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_take_their_input_by_its_name(plain, name, value):
    torch.manual_seed(0)
    dense = nn.ModuleDict({"layer": copy.deepcopy(plain)})
    model = sparsify(nn.ModuleDict({"layer": plain}), SparseConfig(density=0.5, targets=["layer"]))
    for each in (model, dense):
        each["layer"](**{name: value}).square().sum().backward()
    (weight,) = model.sparsity.weights.values()
    expected = dense["layer"].weight.grad.flatten()[weight.flat_positions()]
    torch.testing.assert_close(weight.delta.grad, expected)


def test_a_parameter_without_a_dimension(tmp_path):
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.temperature = nn.Linear(300, 300), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) / self.temperature

    plain, x = Tempered(), torch.randn(3, 300)
    dense = copy.deepcopy(plain)
    share = 1 / sum(parameter.numel() for parameter in plain.parameters())
    model = sparsify(copy.deepcopy(plain), SparseConfig(density=share, targets=["temperature"]))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    assert cpu.load_operator() is not None  # as where another weight has a sampled gradient
    for each in (model, dense):
        each(x).square().mean().backward()
    (weight,) = model.sparsity.weights.values()
    torch.testing.assert_close(weight.delta.grad, dense.temperature.grad.view(1))
    optimizer.step()
    output = model(x)
    assert not torch.equal(output, plain(x))
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(load_adapter(copy.deepcopy(plain), tmp_path / "adapter")(x), output)


def test_the_gradient_of_an_expanded_loss_gradient():
    base, model = both("mlp")
    assert_gradients(model, base, lambda model: model(batch_of("mlp")["input"]).sum().backward())


def test_falcons_own_linear_layer():
    base = tiny("falcon")
    model = sparsify(copy.deepcopy(base), SparseConfig(density=0.03))
    nudge(model)
    dense = dense_copy(base, model)
    assert_gradients(model, dense, lambda model: loss_of(model, batch_of("llama")).backward())
    merged = merge_and_unload(model)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]


def test_positions_that_are_refused_halfway_leave_the_weights():
    """The original values are not known yet, so nothing may be restored from them."""
    _, sparse = both("mlp")
    selections = [weight.selection for weight in sparse.sparsity.weights.values()]
    base = base_model("mlp")
    before = plain_state(base)

    def chunks(selection, device):
        yield selection.positions(device)[:1]
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        apply_selection(base, CASES["mlp"], selections, [], chunks)
    assert_same_bits(plain_state(base), before)
