"""Selects the trained scalars of a model, by a config's targets and budget or at positions given by the caller."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.selection import draws
from sparse_zero.selection.budget import counts_for_density, counts_for_rank
from sparse_zero.selection.columns import COLUMNS, Columns
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.draws import STRATIFIED
from sparse_zero.selection.input_columns import choose_columns
from sparse_zero.selection.packed import check_packed
from sparse_zero.selection.rules import STORED, Selection
from sparse_zero.selection.targets import Target, all_targets, find_targets, parameter_names, untargeted
from sparse_zero.selection.unsupported import only_supported
from sparse_zero.zero.parameters import gathered

Choose = Callable[
    [Mapping[str, Target], Mapping[str, int], Mapping[str, tuple[int, ...]]],
    dict[str, torch.Tensor],
]
"""Selects scalars: (targets, number of scalars of each, rows of some that are selected in full) -> positions in the
flattened parameters, int64 (count,), sorted; all by parameter name. May be collective."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def select_scalars(
    model: nn.Module,
    config: SparseConfig,
    whole_modules: list[str],
    positions: Mapping[str, torch.Tensor] | None = None,
    choose: Choose | None = None,
) -> tuple[list[Selection], dict[str, torch.Tensor]]:
    """Select the trained scalars. Collective under ZeRO stage 3 if weights are selected by magnitude, and always with
    `choose`.

    Args:
        model: the base model.
        config: the targets, the budget and the rule.
        whole_modules: names of the modules that are trained in full.
        positions: positions in the flattened parameters, by parameter name. If given, they replace the targets, the
            budget and the rule of the config.
        choose: for a rule that uses gradients.

    Returns:
        The selections, and the positions, int64 (n,) by parameter name, of those that cannot be drawn again.

    Raises:
        UserError: a pattern matches nothing, a target cannot be trained, the budget is impossible, the positions are
            invalid, or `choose` is missing.
    """
    parameters, whole = all_targets(model), parameter_names(model, whole_modules)
    rows = _token_rows(model, config, parameters, whole)
    if positions is not None:
        stored = {name: _checked_positions(name, flat, parameters, whole) for name, flat in positions.items()}
        selections = [
            Selection(STORED, name, tuple(parameters[name].shape), flat.numel()) for name, flat in stored.items()
        ]
        return selections, stored
    check_packed(model, config, whole_modules)
    targets = only_supported(find_targets(model, config, whole_modules), leave_out=config.targets == "all")
    columns, counts = choose_columns(config, targets, _counts(config, parameters, targets, whole, rows), rows)
    selections, stored = [], {}
    if config.uses_gradients:
        if choose is None:
            raise UserError(
                f"sparse.selection: {config.selection} needs examples: pass batches= to sparsify, or train a recipe"
            )
        stored = choose(targets, {name: count for name, count in counts.items() if count}, rows)
    for name, count in counts.items():
        target, own_rows = targets[name], rows.get(name, ())
        if config.stores_positions:
            if not config.uses_gradients:
                stored[name] = _by_magnitude(target, config, count, own_rows)
            selections.append(Selection(STORED, name, tuple(target.shape), count, whole_rows=own_rows))
        else:
            selections.append(_by_rule(target, config, count, own_rows, columns.get(name)))
    for name in [name for name in rows if name not in counts]:
        shape = tuple(parameters[name].shape)
        count = len(rows[name]) * shape[1]
        selections.append(Selection(STRATIFIED, name, shape, count, config.seed, whole_rows=rows[name]))
    return [selection for selection in selections if selection.count], stored


def _counts(
    config: SparseConfig,
    parameters: Mapping[str, Target],
    targets: Mapping[str, Target],
    whole: list[str],
    rows: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
    """The number of trained scalars of each target, rows of tokens included."""
    sizes = {name: target.shape.numel() for name, target in targets.items()}
    in_rows = {name: len(rows[name]) * parameters[name].shape[1] for name in rows}
    available = {name: size - in_rows.get(name, 0) for name, size in sizes.items()}
    granularity = {name: _granularity(target, config, name in rows) for name, target in targets.items()}
    density = config.model_density
    if density is None:
        counts = counts_for_rank(config.rank_equivalent, {n: t.matrices for n, t in targets.items()}, granularity)
    else:
        counts = counts_for_density(
            density,
            sum(target.shape.numel() for target in parameters.values()),
            sum(parameters[name].shape.numel() for name in whole) + sum(in_rows.values()),
            available,
            granularity,
            config.budget,
            untargeted(targets, parameters, whole),
        )
    return {name: min(count, available[name]) + in_rows.get(name, 0) for name, count in counts.items()}


def _granularity(target: Target, config: SparseConfig, has_rows: bool) -> int:
    """The number of rows of a target's strips. It is 1 for vectors and for embeddings with whole rows.

    Raises:
        UserError: the configured granularity does not divide the number of rows.
    """
    if config.granularity == 1 or has_rows or target.matrices is None:
        return 1
    if target.shape[-2] % config.granularity:
        raise UserError(
            f"sparse.granularity: {config.granularity} does not divide the {target.shape[-2]} rows of {target.name}, "
            f"{' x '.join(map(str, target.shape))}: set a divisor, or remove it from the targets (exclude_modules)"
        )
    return config.granularity


def _by_rule(
    target: Target, config: SparseConfig, count: int, rows: tuple[int, ...], columns: Columns | None
) -> Selection:
    name, shape = target.name, tuple(target.shape)
    if columns is not None:
        return Selection(COLUMNS, name, shape, count, config.seed, columns=columns)
    granularity = _granularity(target, config, bool(rows))
    if config.selection == "stratified":
        return Selection(STRATIFIED, name, shape, count, config.seed, granularity=granularity, whole_rows=rows)
    # The count from the budget is the expected value of the random count.
    in_rows = len(rows) * shape[-1]
    probability = (count - in_rows) / (target.shape.numel() - in_rows)
    return Selection.bernoulli(name, shape, probability, config.seed, rows)


def _by_magnitude(target: Target, config: SparseConfig, count: int, rows: tuple[int, ...]) -> torch.Tensor:
    """Collective under ZeRO stage 3."""
    with gathered([target.parameter]):
        layer = target.quantized
        weight = target.parameter.detach() if layer is None else layer.dequantized()
        return draws.by_magnitude(weight, count, config.selection == "magnitude-smallest", rows)


def _token_rows(
    model: nn.Module, config: SparseConfig, parameters: Mapping[str, Target], whole: list[str]
) -> dict[str, tuple[int, ...]]:
    """The embedding rows that are trained in full, by parameter name."""
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
                f"sparse.trainable_token_indices: {tokens[-1]} is not in the vocabulary of {size} tokens: "
                "call model.resize_token_embeddings first, or list the tokens in a recipe's model.new_tokens"
            )
        if parameters[name].quantized is not None:
            raise UserError(
                f"sparse.trainable_token_indices: {name} is quantized, and its rows cannot be trained in full: load "
                "the model with it in llm_int8_skip_modules"
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
        raise UserError(
            f"positions: '{name}' is already trained in full (sparse.modules_to_save, or the default head)"
        )
    if not isinstance(flat, torch.Tensor) or flat.dim() != 1 or flat.dtype not in _INTEGERS:
        raise UserError(f"positions: '{name}' needs a tensor of integers (n,)")
    size = parameters[name].shape.numel()
    flat = flat.detach().to(torch.int64)
    if flat.numel() == 0 or bool((flat.diff() <= 0).any()) or flat[0] < 0 or flat[-1] >= size:
        raise UserError(f"positions: '{name}' needs at least one position, strictly increasing, in 0 to {size - 1}")
    return flat
