"""sparse.indices and sparse.transient_mib: the memory for a weight's tensors; results do not depend on it."""

import copy
import logging

import pytest
import torch
from torch import nn

from sparse_zero import SparseConfig, sparsify
from sparse_zero.model import layers
from sparse_zero.model.weight import SparseWeight

KINDS = [
    {},
    {"granularity": 4},
    {"selection": "bernoulli"},
    {"selection": "magnitude"},
    {"trainable_token_indices": [3, 7]},
]


class Tower(nn.Module):
    """A model with a parameter of each kind that has its own gradient code."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 8)
        self.table = nn.Parameter(torch.randn(8, 8))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.embedding(ids)).relu()) @ self.table


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(model: nn.Module, **settings) -> nn.Module:
    sparsify(model, SparseConfig(density=0.1, targets="all", seed=5, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        model(torch.arange(step, step + 12) % 40).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.arange(4))
    return model


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_regenerated_indices_train_alike(settings):
    plain = Tower()
    stored, regenerated = (trained(copy.deepcopy(plain), indices=i, **settings) for i in ("stored", "regenerated"))
    for name, weight in stored.sparsity.weights.items():
        other = regenerated.sparsity.weights[name]
        assert torch.equal(weight.weight, other.weight)
        assert not torch.equal(weight.weight, plain.get_parameter(name))
        assert torch.equal(weight.flat_positions(), other.flat_positions())


@pytest.mark.parametrize(
    ("settings", "together"),
    [({}, False), ({"granularity": 4}, False), ({"selection": "bernoulli"}, True)],
    ids=str,
)
def test_experts_draw_their_own_strips(monkeypatch, settings, together):
    """A rule without slices draws the positions once for all parts that are used together."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(16, 8, 12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if together:
                return torch.bmm(x.expand(16, 5, 12), self.experts.mT).square().sum()
            return sum((x @ expert.T).square().sum() for expert in self.experts)

    config = SparseConfig(density=0.5, targets="all", indices="regenerated", **settings)
    model = sparsify(Experts(), config)
    model(torch.randn(5, 12)).backward()  # finds where each one begins
    (weight,) = model.sparsity.weights.values()
    # The strips of a slice are as many in any case, but a rule without slices must draw those before it
    method = "chunks" if together else "strip_chunks"
    drawn, plain = [], getattr(type(weight.selection), method)

    def counted(*args):
        for chunk in plain(*args):
            drawn.append(chunk.numel())
            yield chunk

    monkeypatch.setattr(type(weight.selection), method, counted)
    model(torch.randn(5, 12)).backward()
    assert weight.selection.strip_count <= sum(drawn) <= 2 * weight.selection.strip_count


def replicated_bytes(weight: SparseWeight) -> int:
    """The bytes of all tensors of a selected weight besides the weight itself, its delta included."""
    module, name = weight.owners[0]
    beside = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return sum(x.untyped_storage().nbytes() for key, x in beside if key.startswith(f"{name}_"))


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"indices": "stored"}, 8),
        ({"indices": "stored", "granularity": 4}, 5),
        ({"indices": "regenerated"}, 4),
        ({"indices": "regenerated", "granularity": 4}, 4),
    ],
    ids=str,
)
def test_bytes_of_each_scalar_in_half_precision(settings, most):
    # DeepSpeed casts the model; the float32 deltas are in its optimizer's partitions
    model = sparsify(Tower(), SparseConfig(density=0.1, targets="all-linear", **settings)).bfloat16()
    model(torch.arange(12)).float().square().sum().backward()
    for weight in model.sparsity.weights.values():
        assert weight.delta.dtype == torch.bfloat16
        assert replicated_bytes(weight) == most * weight.selection.count


def test_positions_that_cannot_be_regenerated_are_stored_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        model = trained(Tower(), indices="regenerated", selection="magnitude")
    assert "cannot be regenerated: they are stored" in caplog.text
    for weight in model.sparsity.weights.values():
        module, name = weight.owners[0]
        assert getattr(module, f"{name}_strips").numel() == weight.selection.count


def test_the_gradient_is_held_to_the_setting(monkeypatch):
    bounds = []
    for module, name in ((layers, "sampled_product"), (layers, "embedding_product")):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, plain=plain: (bounds.append((name, args[3])), plain(*args))[1]
        )
    trained(Tower(), transient_mib=3)
    assert set(bounds) == {("sampled_product", 3 * 2**20), ("embedding_product", 3 * 2**20)}
