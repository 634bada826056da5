"""`sparsify`: freeze a model but for a random subset of its scalars, and take that back, merge it or pause it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from sparse_zero import layers, selection
from sparse_zero.config import SparseConfig
from sparse_zero.errors import UserError
from sparse_zero.layers import SparseWeight, UpdateClock
from sparse_zero.targets import find_targets, find_whole
from sparse_zero.zero import full_numel, gathered, settle


@dataclass
class Sparsity:
    """What `sparsify` did to a model. Held by the model as `model.sparsity`."""

    config: SparseConfig
    weights: dict[str, SparseWeight]
    """The selected weights by parameter name, as in the base model's state dict."""
    whole: list[str]
    """Names of the parameters that are trained whole."""
    total_parameters: int
    """Scalars of the base model, tied ones once."""
    selected_parameters: int
    whole_parameters: int
    clock: UpdateClock = field(repr=False)
    base_model: str | None = None
    """Where the base model came from: a hub id, a directory or package://...; adapters carry it."""
    revision: str | None = None
    tokenizer: str | None = None
    """Where the tokenizer came from, if not from the base model."""

    @property
    def trainable_parameters(self) -> int:
        return self.selected_parameters + self.whole_parameters


def sparsify(model: nn.Module, config: SparseConfig) -> nn.Module:
    """Make `config.density` of the model's scalars trainable and freeze the rest, in place.

    The result computes what it did before, and is trained by anything that trains `parameters()` which require a
    gradient: a plain torch loop, Accelerate, deepspeed.initialize at any ZeRO stage, transformers.Trainer.
    Works on models built under deepspeed.zero.Init (every rank must call it).

    Returns: the same model. Raises UserError: nothing to select from, an impossible density, a model that already is
    sparse.
    """
    _refuse_sparse(model)
    whole_modules = find_whole(model, config)
    targets = find_targets(model, config, whole_modules)
    sizes = {f"{name}.weight": full_numel(module.weight) for name, module in targets.items()}
    # By identity: a tied parameter has one name here, which may be that of another module.
    inside = {id(p) for name in whole_modules for p in model.get_submodule(name).parameters()}
    whole = {n: p for n, p in model.named_parameters() if id(p) in inside}
    total = sum(full_numel(p) for p in model.parameters())
    counts = selection.budget(config.density, total, sum(full_numel(p) for p in whole.values()), sizes)
    return attach(model, config, counts, list(whole))


def attach(model: nn.Module, config: SparseConfig, counts: dict[str, int], whole: list[str]) -> nn.Module:
    """`sparsify` with everything decided: how many scalars of which weights, and the parameters trained whole.

    Raises UserError where the model is sparse already.
    """
    _refuse_sparse(model)
    parameters = dict(model.named_parameters())
    total = sum(full_numel(p) for p in parameters.values())
    model.requires_grad_(False)
    clock = UpdateClock()
    weights = {}
    for name, count in counts.items():
        selected = selection.positions(config.seed, name, full_numel(parameters[name]), count)
        weights[name] = layers.attach(model.get_submodule(name.rpartition(".")[0]), selected, clock)
    for name in whole:
        parameters[name].requires_grad_(True)
    model.sparsity = Sparsity(
        config=config,
        weights=weights,
        whole=whole,
        total_parameters=total,
        selected_parameters=sum(counts.values()),
        whole_parameters=sum(full_numel(parameters[name]) for name in whole),
        clock=clock,
        base_model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
    )
    return model


def _refuse_sparse(model: nn.Module) -> None:
    if hasattr(model, "sparsity"):
        raise UserError("this model is sparse already: call merge_and_unload(model) first")


def sparsity_of(model: nn.Module) -> Sparsity:
    """The record that `sparsify` left on a model, also through the wrappers of DDP, Accelerate and DeepSpeed.

    Raises UserError where the model is not sparse.
    """
    inner = unwrap(model)
    if not hasattr(inner, "sparsity"):
        raise UserError(f"{type(inner).__name__} is not sparse: call sparsify(model, SparseConfig(...)) first")
    return inner.sparsity


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers that hold it as `.module`."""
    while not hasattr(model, "sparsity") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Write the deltas into the weights for good and remove everything that `sparsify` added. In place.

    Under ZeRO stage 3 every rank must call it; the pieces then hold the merged weights.
    """
    model = unwrap(model)
    settle(model)
    for weight in sparsity_of(model).weights.values():
        with gathered([weight.weight, weight.delta], write=True):
            weight.write()
    return _remove(model)


def unload(model: nn.Module) -> nn.Module:
    """Give the base model's weights back, bit for bit, and remove everything that `sparsify` added. In place."""
    with disable_adapter(model):
        return merge_and_unload(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes with its original weights (modules trained whole keep their training)."""
    before = {weight: weight.enabled for weight in sparsity_of(model).weights.values()}
    for weight in before:
        weight.enabled = False
    try:
        yield
    finally:
        for weight, enabled in before.items():
            weight.enabled = enabled


def _remove(model: nn.Module) -> nn.Module:
    for weight in model.sparsity.weights.values():
        layers.detach(weight.module)
    del model.sparsity
    return model.requires_grad_(True)
