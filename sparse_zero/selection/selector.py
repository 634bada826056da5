"""What is drawn from which parameters of a model: targets and budget of a config, or the positions of a caller."""

from collections.abc import Mapping

import torch
from torch import nn

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.selection import rules
from sparse_zero.selection.budget import by_density, by_rank
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import STORED, STRATIFIED, Draw
from sparse_zero.selection.targets import Target, all_targets, find_targets, parameters_of, untargeted
from sparse_zero.zero.parameters import gathered


def decide(
    model: nn.Module,
    config: SparseConfig,
    whole_modules: list[str],
    positions: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Draw], dict[str, torch.Tensor]]:
    """Args: whole_modules: those that are trained whole; positions: as in `sparsify`.

    Returns: the draws, and the positions int64 (n,) of those that cannot be repeated, by parameter name. Collective
    under ZeRO stage 3 where weights are selected by their magnitude.
    Raises UserError: targets that match nothing, a budget that cannot be met, positions that do not fit.
    """
    parameters, whole = all_targets(model), parameters_of(model, whole_modules)
    rows = _token_rows(model, config, parameters, whole)
    if positions is not None:
        stored = {name: _checked_positions(name, flat, parameters, whole) for name, flat in positions.items()}
        return [
            Draw(STORED, name, tuple(parameters[name].shape), flat.numel()) for name, flat in stored.items()
        ], stored
    targets = find_targets(model, config, whole_modules)
    counts = _counts(config, parameters, targets, whole, rows)
    draws, stored = [], {}
    for name, count in counts.items():
        target, own_rows = targets[name], rows.get(name, ())
        if config.selection.startswith("magnitude"):
            stored[name] = _by_magnitude(target, config, count, own_rows)
            draws.append(Draw(STORED, name, tuple(target.shape), count, whole_rows=own_rows))
        else:
            draws.append(_draw(target, config, count, own_rows))
    for name in [name for name in rows if name not in counts]:
        shape = tuple(parameters[name].shape)
        draws.append(Draw(STRATIFIED, name, shape, len(rows[name]) * shape[1], config.seed, whole_rows=rows[name]))
    return [draw for draw in draws if draw.count], stored


def _counts(
    config: SparseConfig,
    parameters: Mapping[str, Target],
    targets: Mapping[str, Target],
    whole: list[str],
    rows: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
    """How many scalars of each target train, rows of tokens included."""
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


def _draw(target: Target, config: SparseConfig, count: int, rows: tuple[int, ...]) -> Draw:
    name, shape = target.name, tuple(target.shape)
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
        return rules.by_magnitude(weight, count, config.selection == "magnitude-smallest", rows)


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
