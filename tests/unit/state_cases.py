"""A small network with deltas in every parameter, for tests of the state of a sparse model."""

from pathlib import Path

import torch
from sparse_cases import dense_copy, nudge
from torch import nn

from sparse_zero import SparseConfig, save_adapter, sparsify

CONFIG = SparseConfig(density=0.2, targets="all")
X = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)).eval()


def sparse_mlp(base: int = 0, **settings: object) -> nn.Module:
    """With random deltas.

    Args: base: the seed of the original values.
    """
    model = sparsify(mlp(base), CONFIG.model_copy(update=settings))
    nudge(model)
    return model


class Products(nn.Module):
    """A product with a parameter, and another reader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(10, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w) * self.v


HEAD = CONFIG.model_copy(update={"density": 0.5, "modules_to_save": ["2"]})


def with_head(seed: int = 0) -> nn.Module:
    """With random deltas, and a last layer that is trained fully and has random values."""
    model = sparsify(mlp(), HEAD.model_copy(update={"seed": seed}))
    nudge(model, seed + 3)
    generator = torch.Generator().manual_seed(seed + 10)
    with torch.no_grad():
        model[2].weight.add_(torch.randn(4, 20, generator=generator))
    return model


def dense_with_head(model: nn.Module) -> nn.Module:
    """A plain network with the values that a model of `with_head` must compute with."""
    plain = dense(model)
    with torch.no_grad():
        plain[2].weight.copy_(model[2].weight)
        plain[2].bias.copy_(model[2].bias)
    return plain


def dense(model: nn.Module, base: nn.Module | None = None) -> nn.Module:
    """A plain network with the values that `model` must compute with."""
    return dense_copy(mlp() if base is None else base, model)


def output(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def deltas(model: nn.Module) -> list[nn.Parameter]:
    return [weight.delta for weight in model.sparsity.weights.values()]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [delta.grad.clone() for delta in deltas(model)]


def clear(model: nn.Module) -> None:
    for delta in deltas(model):
        delta.grad = None


def saved(model: nn.Module, directory: Path) -> Path:
    save_adapter(model, directory)
    return directory
