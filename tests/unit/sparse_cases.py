"""Small models and batches for tests of sparse training, and dense training as the reference."""

import copy
from collections.abc import Callable, Iterable

import torch
from families import VOCABULARY, tiny
from torch import nn

from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection import draws
from sparse_zero.selection.config import SparseConfig

Batch = dict[str, torch.Tensor]
Positions = dict[str, torch.Tensor]

CASES = {
    "mlp": SparseConfig(density=0.1, targets="all-linear", seed=1),
    "llama": SparseConfig(density=0.03),
    "gpt2": SparseConfig(density=0.03, seed=7),
    "bert": SparseConfig(density=0.03),
}
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1


def base_model(case: str) -> nn.Module:
    if case == "mlp":
        torch.manual_seed(0)
        layers = [nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)]
        return nn.Sequential(*layers)
    return tiny(case, "sequence-classification" if case == "bert" else "causal-lm")


def both(case: str, **settings) -> tuple[nn.Module, nn.Module]:
    """The base model, and a sparse copy of it."""
    base = base_model(case)
    return base, sparsify(copy.deepcopy(base), CASES[case].model_copy(update=settings))


def batches(case: str, count: int, seed: int = 0) -> Iterable[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        if case == "mlp":
            yield {"input": torch.randn(8, 12, generator=generator), "labels": torch.randn(8, 4, generator=generator)}
        else:
            tokens = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
            yield {"input_ids": tokens, "labels": tokens[:, 0] % 2 if case == "bert" else tokens}


def batch_of(case: str) -> Batch:
    return next(iter(batches(case, 1, seed=5)))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    if "input" in batch:
        return nn.functional.mse_loss(model(batch["input"]), batch["labels"])
    return model(**batch).loss


def output_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(batch["input"]) if "input" in batch else model(input_ids=batch["input_ids"]).logits


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def train(model: nn.Module, steps: Iterable[Batch]) -> list[float]:
    optimizer, losses = adamw(trainable(model)), []
    for batch in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def drawn(model: nn.Module) -> Positions:
    """The positions of each selected weight, by name."""
    seed = model.sparsity.config.seed
    return {
        name: draws.stratified_positions(seed, name, weight.weight.numel(), weight.delta.numel())
        for name, weight in model.sparsity.weights.items()
    }


def train_reference(model: nn.Module, drawn: Positions, whole: list[str], steps: Iterable[Batch]) -> list[float]:
    """Train with masked dense gradients. Weight decay pulls selected scalars to their pretrained values."""
    weights = dict(model.named_parameters())
    pretrained = {name: weights[name].detach().clone() for name in drawn}
    masks = {name: torch.zeros_like(weights[name]).flatten() for name in drawn}
    for name, flat in drawn.items():
        masks[name][flat] = 1
    changes = {name: torch.zeros_like(weights[name], requires_grad=True) for name in drawn}
    optimizer, losses = adamw([*changes.values(), *(weights[name] for name in whole)]), []
    for batch in steps:
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        for name, change in changes.items():
            change.grad = weights[name].grad * masks[name].view_as(change)
        optimizer.step()
        with torch.no_grad():
            for name, change in changes.items():
                weights[name].copy_(pretrained[name] + change)
        losses.append(loss.item())
    return losses


def nudge(model: nn.Module, seed: int = 3) -> None:
    """Give the deltas large random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.add_(torch.randn(weight.delta.shape, generator=generator))


def dense_copy(base: nn.Module, model: nn.Module) -> nn.Module:
    """The base model with the deltas of `model` added to its weights."""
    dense = copy.deepcopy(base)
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for name, flat in drawn(model).items():
            values = weights[name].flatten()
            values[flat] = (values[flat].float() + model.sparsity.weights[name].delta).to(values.dtype)
            weights[name].copy_(values.view_as(weights[name]))
    return dense.train(model.training)


def assert_gradients(
    model: nn.Module, dense: nn.Module, backward: Callable[[nn.Module], None], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """After `backward(model)`, the deltas have the dense model's weight gradients at the selected positions."""
    backward(dense)
    backward(model)
    weights = dict(dense.named_parameters())
    for name, flat in drawn(model).items():
        expected = weights[name].grad.flatten()[flat]
        assert expected.abs().max() > 0
        torch.testing.assert_close(
            model.sparsity.weights[name].delta.grad, expected, rtol=rtol, atol=atol, check_dtype=False
        )


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base model's entries in the state dict."""
    own = ("weight_delta", "weight_base", "weight_positions", "bias_delta", "bias_base", "bias_positions")
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith(own)}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name
