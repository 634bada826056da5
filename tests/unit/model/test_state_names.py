"""What sparsify leaves alone: names of the module's own, `requires_grad`, the size of the embeddings, tied weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from families import tiny
from sparse_cases import batch_of, dense_copy, nudge, output_of
from state_cases import CONFIG, X, deltas, mlp, output, saved
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from sparse_zero import (
    SparseConfig,
    UserError,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    sparsify,
    unload,
    unmerge_adapter,
)
from sparse_zero.model.sparsity import sparsity_of


class OwnBuffer(nn.Linear):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.register_buffer("weight_base", torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight_base


class OwnParameter(nn.Linear):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.weight_delta = nn.Parameter(torch.randn(columns, rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.weight_delta, self.bias)


class OwnAttribute(nn.Linear):
    weight_strips = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight_strips


class OwnSparsity(nn.Sequential):
    """A model with an attribute that is ours in other models."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.sparsity = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.sparsity


@pytest.mark.parametrize("layer", [OwnBuffer, OwnParameter, OwnAttribute])
@pytest.mark.parametrize("outer", [nn.Sequential, OwnSparsity])
def test_names_of_the_modules_own(layer, outer, tmp_path):
    torch.manual_seed(0)
    base = outer(layer(10, 10), nn.Linear(10, 3)).eval()
    model = sparsify(copy.deepcopy(base), SparseConfig(density=0.1, targets="all-linear"))
    assert torch.equal(output(model), output(base))
    names = {name for name, _ in (*base.named_parameters(), *base.named_buffers())}
    weight = sparsity_of(model).weights["0.weight"]
    with torch.no_grad():
        weight.delta.add_(torch.arange(weight.delta.numel()) + 1.0)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain[0].weight.view(-1)[weight.flat_positions()] += weight.delta
    assert torch.equal(output(model), output(plain))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    other = sparsify(outer(layer(10, 10), nn.Linear(10, 3)).eval(), SparseConfig(density=0.1, targets="all-linear"))
    other.load_state_dict(state)
    assert torch.equal(output(other), output(plain))
    assert torch.equal(output(load_adapter(copy.deepcopy(base), saved(model, tmp_path / "adapter"))), output(plain))
    assert torch.equal(output(merge_and_unload(copy.deepcopy(model))), output(plain))
    unload(model)
    assert {name for name, _ in (*model.named_parameters(), *model.named_buffers())} == names
    assert vars(model).get("sparsity") == vars(base).get("sparsity")
    assert torch.equal(output(model), output(base))


class Frozen(nn.Module):
    """Parameters that do not require a gradient, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(10, 6)
        self.position = nn.Parameter(torch.randn(6), requires_grad=False)
        self.order = nn.Parameter(torch.arange(6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.position + self.order


@pytest.mark.parametrize("take_off", [unload, merge_and_unload])
@pytest.mark.parametrize("targets", ["all-linear", "all"])
def test_requires_grad_is_what_it_was(take_off, targets):
    model = sparsify(Frozen(), SparseConfig(density=0.2, targets=targets))
    take_off(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "layer.weight": True,
        "layer.bias": True,
        "position": False,
        "order": False,
    }


def test_requires_grad_over_merge_and_unmerge():
    model = sparsify(Frozen(), SparseConfig(density=0.2, targets="all-linear"))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    merge_adapter(model)
    assert model.layer.weight.requires_grad
    assert not model.position.requires_grad
    unmerge_adapter(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("resize", [{"new_num_tokens": 100}, {"pad_to_multiple_of": 64}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_keep_their_size(family, resize):
    base = tiny(family).eval()
    model = sparsify(copy.deepcopy(base), SparseConfig(density=0.1, targets="all"))
    nudge(model)
    batch = batch_of(family)
    with torch.no_grad():
        expected = output_of(model, batch)
        with pytest.raises(UserError, match="resize_token_embeddings: the deltas belong to positions"):
            model.resize_token_embeddings(**resize, mean_resizing=False)
        assert torch.equal(output_of(model, batch), expected)
        assert torch.equal(expected, output_of(dense_copy(base, model), batch))
    # What does not change the size is allowed, and gives the embeddings
    assert model.resize_token_embeddings(96) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with torch.no_grad():
        assert torch.equal(output_of(model, batch), expected)
        assert unload(model).resize_token_embeddings(100, mean_resizing=False).weight.shape[0] == 100


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_tie_weights(family):
    task = "seq2seq-lm" if family == "t5" else "causal-lm"
    base = tiny(family, task, tie_word_embeddings=True).eval()
    model = sparsify(copy.deepcopy(base), SparseConfig(density=0.1, targets="all"))
    nudge(model)
    model.tie_weights()
    inputs = {"input_ids": batch_of("llama")["input_ids"]} | (
        {"decoder_input_ids": batch_of("llama")["input_ids"]} if family == "t5" else {}
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense_copy(base, model)(**inputs).logits)
    one, other = model.get_input_embeddings(), model.get_output_embeddings()
    assert one._parameters["weight"] is other._parameters["weight"]
    assert one.weight_delta is other.weight_delta
    model(**inputs).logits.square().mean().backward()
    assert all(delta.grad is not None for delta in deltas(model))
    with torch.no_grad():
        unload(model)
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize("way", ["submodule", "shared"])
def test_a_module_belongs_to_one_sparse_model(way):
    inner = sparsify(mlp(), CONFIG)
    nudge(inner)
    expected = output(inner)
    other = nn.Sequential(inner, nn.Linear(4, 3)) if way == "submodule" else nn.Sequential(inner[0], nn.Linear(20, 3))
    with pytest.raises(UserError, match="belongs to a sparse model already"):
        sparsify(other, SparseConfig(density=0.2, targets="all"))
    assert torch.equal(output(inner), expected)
    assert all(name in dict(other.named_parameters()) for name in ("1.weight", "1.bias"))
    unload(inner)
    sparsify(other, SparseConfig(density=0.2, targets="all"))


def test_a_parameter_belongs_to_one_sparse_model():
    one, other = nn.Sequential(nn.Linear(10, 10)), nn.Sequential(nn.Linear(10, 10))
    other[0].weight = one[0].weight
    sparsify(one, CONFIG)
    with pytest.raises(UserError, match=r"0\.weight belongs to a sparse model already"):
        sparsify(other, CONFIG.model_copy(update={"seed": 3}))


def refused(model: nn.Module, change: Callable[[], object], error: type[Exception]) -> None:
    """The change raises, and leaves the model as it was."""
    before = output(model), [name for name, _ in model.named_parameters()], [type(m) for m in model.modules()]
    with pytest.raises(error):
        change()
    assert torch.equal(output(model), before[0])
    assert [name for name, _ in model.named_parameters()] == before[1]
    assert [type(module) for module in model.modules()] == before[2]


def test_assignments_that_are_refused_change_nothing():
    model = sparsify(mlp(), CONFIG)
    nudge(model)
    wrong = nn.Parameter(torch.zeros(3, 3))
    refused(model, lambda: setattr(model[0], "weight", wrong), UserError)
    refused(model, lambda: setattr(model[0], "bias", model[2].weight), UserError)
    refused(model, lambda: setattr(model[0], "weight", torch.zeros(20, 10)), Exception)
    state = model.state_dict() | {"0.weight": torch.zeros(3, 3)}
    refused(model, lambda: sparsify(model, CONFIG), UserError)
    with pytest.raises(RuntimeError, match="size mismatch"):
        sparsify(mlp(), CONFIG).load_state_dict(state)


def test_loading_an_adapter_of_another_shape_changes_nothing(tmp_path):
    other = sparsify(nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 4)).eval(), CONFIG)
    saved(other, tmp_path / "other")
    model = sparsify(mlp(), CONFIG)
    nudge(model)
    refused(model, lambda: load_adapter(model, tmp_path / "other"), UserError)
    plain = mlp()
    refused(plain, lambda: load_adapter(plain, tmp_path / "other"), UserError)
    assert torch.equal(plain(X), mlp()(X))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_sparse_weight_is_not_parametrized():
    model = sparsify(mlp(), CONFIG)
    expected = output(model)
    with pytest.raises(UserError, match=r"0\.weight: a sparse weight cannot be removed or parametrized"):
        register_parametrization(model[0], "weight", Doubled())
    assert torch.equal(output(model), expected)
    assert not is_parametrized(model[0])
    plain = mlp()
    register_parametrization(plain[0], "weight", Doubled())
    register_parametrization(sparsify(plain, SparseConfig(density=0.05, targets=["0.bias"]))[2], "weight", Doubled())
    assert is_parametrized(plain[0], "weight")
    assert is_parametrized(plain[2], "weight")
