"""`sparsify`: freeze a model but for a random subset of its scalars, and take that back, merge it or pause it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparse_zero import layers, selection
from sparse_zero.budget import by_density, by_rank
from sparse_zero.config import SparseConfig
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.fingerprint import fingerprint
from sparse_zero.layers import SparseWeight, UpdateClock
from sparse_zero.selection import STORED, STRATIFIED, Draw
from sparse_zero.targets import Target, all_targets, find_targets, find_whole, untargeted
from sparse_zero.zero import gathered, is_partitioned, let_leaf_inputs_have_gradients, settle


@dataclass
class Sparsity:
    """What `sparsify` did to a model. Held by the model as `model.sparsity`."""

    config: SparseConfig
    weights: dict[str, SparseWeight]
    """The selected weights by parameter name, as in the base model's state dict."""
    whole: list[str]
    """Names of the parameters that are trained whole."""
    originals: dict[str, torch.Tensor] = field(repr=False)
    """What these held before, on the CPU."""
    total_parameters: int
    """Scalars of the base model, tied ones once."""
    selected_parameters: int
    whole_parameters: int
    clock: UpdateClock = field(repr=False)
    fingerprint: dict[str, str] = field(repr=False)
    """Of the base model; adapters carry it."""
    name: str = "default"
    """Of the adapter, where a model has several."""
    base_model: str | None = None
    """Where the base model came from: a hub id, a directory or package://...; adapters carry it."""
    revision: str | None = None
    tokenizer: str | None = None
    """Where the tokenizer came from, if not from the base model."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens that were added to it."""
    results: dict[str, Any] = field(default_factory=dict)
    """Figures of the run that trained it, for the model card."""
    hooks: list[Any] = field(default_factory=list, repr=False)
    leaves_settled: bool = False

    @property
    def trainable_parameters(self) -> int:
        return self.selected_parameters + self.whole_parameters


def sparsify(model: nn.Module, config: SparseConfig, positions: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Make a part of the model's scalars trainable and freeze the rest, in place.

    The result computes what it did before, and is trained by anything that trains `parameters()` which require a
    gradient: a plain torch loop, Accelerate, deepspeed.initialize at any ZeRO stage, transformers.Trainer.
    Works on models built under deepspeed.zero.Init (every rank must call it).

    Args: positions: int64 (n,) by parameter name, indices into the flattened parameters: train these scalars, whatever
        the config says of targets, budget and selection.
    Returns: the same model. Raises UserError: nothing to select from, an impossible budget, a model that already is
    sparse, positions that do not fit.
    """
    refuse_sparse(model)
    whole_modules = find_whole(model, config)
    # By identity: a tied parameter has one name here, which may be that of another module.
    inside = {id(p) for name in whole_modules for p in model.get_submodule(name).parameters()}
    parameters = all_targets(model)
    whole = [name for name, target in parameters.items() if id(target.parameter) in inside]
    rows = _token_rows(model, config, parameters, whole)
    if positions is not None:
        chosen = {name: _checked_positions(name, flat, parameters, whole) for name, flat in positions.items()}
        draws = [Draw(STORED, name, tuple(parameters[name].shape), flat.numel()) for name, flat in chosen.items()]
        return attach(model, config, draws, whole, chosen)
    targets = find_targets(model, config, whole_modules)
    counts = _counts(model, config, targets, whole, rows)
    if config.selection.startswith("magnitude"):
        chosen = {name: _by_magnitude(targets[name], config, n, rows.get(name, ())) for name, n in counts.items()}
        draws = [
            Draw(STORED, name, tuple(targets[name].shape), chosen[name].numel(), whole_rows=rows.get(name, ()))
            for name in counts
        ]
    else:
        chosen = {}
        draws = [_draw(name, targets[name], config, n, rows.get(name, ())) for name, n in counts.items()]
    for name in rows.keys() - counts.keys():
        shape = tuple(parameters[name].shape)
        draws.append(Draw(STRATIFIED, name, shape, len(rows[name]) * shape[1], config.seed, whole_rows=rows[name]))
    return attach(model, config, [draw for draw in draws if draw.count], whole, chosen)


def attach(
    model: nn.Module,
    config: SparseConfig,
    draws: Iterable[Draw],
    whole: list[str],
    positions: Mapping[str, torch.Tensor] | None = None,
    base_fingerprint: dict[str, str] | None = None,
) -> nn.Module:
    """`sparsify` with everything decided: what is drawn from which weights, and the parameters trained whole.

    Args: positions: int64 (n,) of each draw that cannot be repeated, and of others that are at hand.
    Raises UserError where the model is sparse already, and what `positions` raises, with the model as it was.
    """
    refuse_sparse(model)
    settle(model)
    parameters = all_targets(model)
    draws = list(draws)
    total = sum(target.shape.numel() for target in parameters.values())
    with_new_rows = {draw.name for draw in draws if draw.whole_rows}
    base = fingerprint(model, {*whole, *with_new_rows}) if base_fingerprint is None else base_fingerprint
    originals = {name: _copy(parameters[name].parameter) for name in whole}
    clock = UpdateClock()
    weights: dict[str, SparseWeight] = {}
    try:
        for draw in draws:
            known = (positions or {}).get(draw.name)
            target = parameters[draw.name]
            selected = draw.positions(target.parameter.device) if known is None else known
            weights[draw.name] = layers.attach(target, draw, selected, clock, config.dropout)
    except UserError:
        for weight in weights.values():
            layers.detach(weight)
        raise
    deltas = {id(weight.delta) for weight in weights.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in deltas)
    for name in whole:
        parameters[name].parameter.requires_grad_(True)
    model.sparsity = Sparsity(
        config=config,
        weights=weights,
        whole=whole,
        originals=originals,
        total_parameters=total,
        selected_parameters=sum(draw.count for draw in draws),
        whole_parameters=sum(parameters[name].shape.numel() for name in whole),
        clock=clock,
        fingerprint=base,
        base_model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
        hooks=[model.register_forward_pre_hook(clock.before_forward), model.register_forward_pre_hook(_settle_leaves)],
    )
    return model


def _settle_leaves(model: nn.Module, _: Any) -> None:
    """DeepSpeed decides on leaf modules, after `sparsify`: the first forward on a partitioned base knows them."""
    sparsity = model.sparsity
    if not sparsity.leaves_settled and is_partitioned(next(iter(sparsity.weights.values())).weight):
        sparsity.hooks += let_leaf_inputs_have_gradients(model)
        sparsity.leaves_settled = True


def _counts(
    model: nn.Module,
    config: SparseConfig,
    targets: Mapping[str, Target],
    whole: list[str],
    rows: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
    """How many scalars of each target train, rows of tokens included."""
    parameters = all_targets(model)
    sizes = {name: target.shape.numel() for name, target in targets.items()}
    taken = {name: len(rows[name]) * parameters[name].shape[1] for name in rows}
    free = {name: size - taken.get(name, 0) for name, size in sizes.items()}
    granularity = {name: _granularity(target, config, name in rows) for name, target in targets.items()}
    density = config.model_density
    if density is None:
        counts = by_rank(config.rank_equivalent, {n: t.matrices for n, t in targets.items()}, granularity)
    else:
        counts = by_density(
            density,
            sum(target.shape.numel() for target in parameters.values()),
            sum(parameters[name].shape.numel() for name in whole) + sum(taken.values()),
            free,
            granularity,
            config.budget,
            untargeted(targets, parameters, whole),
        )
    return {name: min(count, free[name]) + taken.get(name, 0) for name, count in counts.items()}


def _granularity(target: Target, config: SparseConfig, has_rows: bool) -> int:
    """Strips lie in matrices; of vectors and of embeddings with whole rows, single scalars are selected.

    Raises UserError where strips do not fit.
    """
    if config.granularity == 1 or has_rows or target.matrices is None:
        return 1
    if target.shape[-2] % config.granularity:
        raise UserError(
            f"sparse.granularity: {config.granularity} does not divide the {target.shape[-2]} rows of {target.name}, "
            f"{' x '.join(map(str, target.shape))}: give a divisor, or leave it out of the targets"
        )
    return config.granularity


def _draw(name: str, target: Target, config: SparseConfig, count: int, rows: tuple[int, ...]) -> Draw:
    shape = tuple(target.shape)
    granularity = _granularity(target, config, bool(rows))
    if config.selection == "stratified":
        return Draw(STRATIFIED, name, shape, count, config.seed, granularity=granularity, whole_rows=rows)
    # The share of the budget is the expected count.
    taken = len(rows) * shape[-1]
    probability = (count - taken) / (target.shape.numel() - taken)
    return Draw.bernoulli(name, shape, probability, config.seed, rows)


def _by_magnitude(target: Target, config: SparseConfig, count: int, rows: tuple[int, ...]) -> torch.Tensor:
    """Collective under ZeRO stage 3."""
    with gathered([target.parameter]):
        weight = target.parameter.detach()
        return selection.by_magnitude(weight, count, config.selection == "magnitude-smallest", rows)


def _token_rows(
    model: nn.Module, config: SparseConfig, parameters: Mapping[str, Target], whole: list[str]
) -> dict[str, tuple[int, ...]]:
    """Rows that are trained whole, by the name of the embedding's parameter."""
    if not config.trainable_token_indices:
        return {}
    embeddings = [getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output")]
    if embeddings[0] is None:
        raise UserError(f"sparse.trainable_token_indices: {type(model).__name__} has no input embedding")
    tokens = tuple(sorted(set(config.trainable_token_indices)))
    names = {id(target.parameter): name for name, target in parameters.items()}
    rows = {}
    for embedding in filter(None, embeddings):
        name = names[id(embedding._parameters["weight"])]
        size = parameters[name].shape[0]
        if tokens[-1] >= size:
            raise UserError(
                f"sparse.trainable_token_indices: {tokens[-1]} is not in the vocabulary of {size}: "
                "call model.resize_token_embeddings first, or name the tokens in model.new_tokens of a recipe"
            )
        if name not in whole:
            rows[name] = tokens
    return rows


def _checked_positions(
    name: str, flat: torch.Tensor, parameters: Mapping[str, Target], whole: list[str]
) -> torch.Tensor:
    if name not in parameters:
        raise UserError(f"positions: the model has no parameter '{name}'{did_you_mean(name, parameters)}")
    if name in whole:
        raise UserError(f"positions: '{name}' is trained whole already")
    size = parameters[name].shape.numel()
    flat = flat.detach().to(torch.int64).flatten()
    if flat.numel() == 0 or bool((flat.diff() <= 0).any()) or flat[0] < 0 or flat[-1] >= size:
        raise UserError(f"positions: those of '{name}' must be increasing, within 0 to {size - 1}, and at least one")
    return flat


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    with gathered([parameter]):
        return parameter.detach().to("cpu", copy=True)


def refuse_sparse(model: nn.Module) -> None:
    """Raises UserError where the model is sparse."""
    if hasattr(model, "sparsity"):
        raise UserError("this model is sparse already: call merge_and_unload(model) or unload(model) first")


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
    model = unwrap(model)
    with disable_adapter(model):
        for weight in model.sparsity.weights.values():
            with gathered([weight.weight], write=True):
                weight.write()
        # Taken out here, so that leaving the block does not bring the trained values back
        model.sparsity.whole.clear()
    return _remove(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes with its original weights, those of modules trained whole included.

    Under ZeRO stage 3 every rank must enter and leave it.
    """
    model = unwrap(model)
    sparsity = sparsity_of(model)
    settle(model)
    parameters = dict(model.named_parameters())
    before = {weight: weight.enabled for weight in sparsity.weights.values()}
    trained = {name: _copy(parameters[name]) for name in sparsity.whole}
    for weight in before:
        weight.enabled = False
    _set(parameters, {name: sparsity.originals[name] for name in sparsity.whole})
    try:
        yield
    finally:
        for weight, enabled in before.items():
            weight.enabled = enabled
        _set(parameters, {name: trained[name] for name in sparsity.whole})


def set_scale(model: nn.Module, scale: float) -> None:
    """Let the deltas count `scale` times: W = w0 + scale * delta. Modules trained whole are not scaled."""
    for weight in sparsity_of(model).weights.values():
        weight.scale = float(scale)


@torch.no_grad()
def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        with gathered([parameters[name]], write=True):
            parameters[name].copy_(value)


def _remove(model: nn.Module) -> nn.Module:
    for weight in model.sparsity.weights.values():
        layers.detach(weight)
    for hook in model.sparsity.hooks:
        hook.remove()
    del model.sparsity
    return model.requires_grad_(True)
