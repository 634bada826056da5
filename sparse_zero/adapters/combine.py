"""Combine adapters of one base model: a weighted sum of their deltas, with PEFT's methods to reduce interference.

The adapters may have different positions. At each position an adapter that has not selected it counts as zero, as in
PEFT's functions for dense matrices (peft.utils.merge_utils).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from sparse_zero.adapters.files import (
    Adapter,
    check_drawing,
    check_finite,
    checked_positions,
    library_versions,
    read_adapter,
    row_mask,
    write_adapter,
)
from sparse_zero.adapters.model_card import model_card
from sparse_zero.adapters.schema import SelectedTensor
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differing_parameters
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.draws import row_positions
from sparse_zero.selection.hashes import stream_key
from sparse_zero.selection.rules import STORED, Selection

CombinationType = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
"""linear: the weighted sum.
magnitude_prune: the weighted sum of the largest deltas of each adapter.
ties (arXiv 2306.01708): the largest deltas of each adapter are kept. At each position a sign is elected by the sum of
the deltas, and the deltas with this sign are averaged.
dare_linear, dare_ties (arXiv 2311.03099): linear or ties, after dropping deltas at random and rescaling the others."""


def combine_adapters(
    directories: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    combination_type: CombinationType = "linear",
    density: float = 1.0,
    seed: int = 0,
) -> Adapter:
    """Combine adapters of the same base model into one, and write it.

        combine_adapters(["adapters/math", "adapters/code"], "adapters/both", weights=[0.7, 0.3])
        combine_adapters(["adapters/math", "adapters/code"], "adapters/ties", combination_type="ties", density=0.5)

    Args:
        directories: the adapters to combine.
        out: the directory to write.
        weights: one for each adapter. None for 1 with ties and dare_ties, which average, and for 1 / number of
            adapters otherwise.
        combination_type: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune"; see `CombinationType`.
        density: the fraction of each adapter's deltas to keep, above 0 and at most 1. Not used by "linear".
        seed: of the random choice in "dare_linear" and "dare_ties".

    Returns: the adapter that was written.

    Raises:
        UserError: the adapters have different base models, fully trained modules, tokens or labels; files are damaged;
            or weights, density or combination_type are invalid.
    """
    if Path(out).resolve() in {Path(directory).resolve() for directory in directories}:
        raise UserError(f"{out}: is one of the adapters to combine; choose another directory")
    adapters = [read_adapter(directory) for directory in directories]
    for adapter, directory in zip(adapters, directories, strict=True):
        check_finite(adapter, directory)
        check_drawing(adapter, directory)
    _check_compatible(adapters, [str(directory) for directory in directories])
    combined = combine(adapters, weights, combination_type, density, seed, [str(d) for d in directories])
    write_adapter(combined, out, model_card(combined.config))
    return combined


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    combination_type: CombinationType = "linear",
    density: float = 1.0,
    seed: int = 0,
    names: Sequence[str] = (),
) -> Adapter:
    """`combine_adapters` in memory.

    Fully trained parameters and rows are averaged, weighted by the absolute values of `weights`.

    Args:
        adapters: the adapters to combine; they must be compatible.
        names: what the adapters are called in errors.
        weights, combination_type, density, seed: see `combine_adapters`.
    """
    names = names or [f"adapter {i + 1}" for i in range(len(adapters))]
    elect = "ties" in combination_type
    if weights is None:
        weights = [1.0 if elect else 1 / len(adapters)] * len(adapters)
    _check_settings(adapters, weights, combination_type, density)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for name in adapter.config.tensors:
            flat, values = _positions_and_deltas(adapter, name, names[i])
            kept = _prune(values, combination_type, density, f"{seed}/{i}/{name}")
            parts.setdefault(name, []).append((flat, kept, weight))
    first = adapters[0].config
    shapes = {name: tensor.shape for adapter in adapters for name, tensor in adapter.config.tensors.items()}
    result = Adapter(first, deltas={}, whole=_weighted_mean([a.whole for a in adapters], weights))
    result.rows = _weighted_mean([adapter.rows for adapter in adapters], weights)
    tensors = {}
    for name, part in parts.items():
        flat, values = _sum(part, elect)
        if values.numel():
            result.deltas[name] = values.to(_dtype(adapters, name))
        if all(adapter.config.tensors.get(name) == first.tensors.get(name) for adapter in adapters):
            # The same selection in all adapters: positions that can be drawn again are not stored
            tensors[name] = first.tensors[name]
            if name in adapters[0].stored_positions:
                result.stored_positions[name] = adapters[0].stored_positions[name]
            continue
        rows = sorted({row for a in adapters if name in a.config.tensors for row in a.config.tensors[name].whole_rows})
        if rows:
            flat = torch.cat([flat, row_positions(torch.tensor(rows), shapes[name][-1])]).sort().values
        selection = Selection(STORED, name, tuple(shapes[name]), flat.numel(), whole_rows=tuple(rows))
        result.stored_positions[name] = flat
        tensors[name] = SelectedTensor.from_selection(selection, flat)
    trained = sum(t.count for t in tensors.values()) + sum(values.numel() for values in result.whole.values())
    total = max(first.total_parameters, trained)
    update = {
        "sparse": SparseConfig(density=min(1.0, trained / total), modules_to_save=first.sparse.modules_to_save),
        "trainable_parameters": trained,
        "total_parameters": total,
        "tensors": tensors,
        "results": {},
        "library_versions": library_versions(),
    }
    result.config = first.model_copy(update=update)
    return result


def _positions_and_deltas(adapter: Adapter, name: str, origin: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions and the float32 deltas of a weight, without fully trained rows: (n,) and (n,)."""
    flat, selection = checked_positions(adapter, name, origin), adapter.selection(name)
    if selection.whole_rows:
        flat = flat[~row_mask(selection, flat)]
    return flat, adapter.deltas[name].float() if name in adapter.deltas else torch.zeros(0)


def _prune(values: torch.Tensor, combination_type: CombinationType, density: float, key: str) -> torch.Tensor:
    """Keep a fraction of the values, the largest or a random choice, and set the others to zero."""
    if combination_type == "linear" or density == 1:
        return values
    if combination_type.startswith("dare"):
        generator = torch.Generator().manual_seed(abs(stream_key(0, key, "dare")))
        kept = torch.rand(values.numel(), generator=generator) < density
        return values * kept / density
    count = int(density * values.numel())
    largest = values.abs().topk(count).indices
    return torch.zeros_like(values).index_copy_(0, largest, values[largest])


def _sum(part: list[tuple[torch.Tensor, torch.Tensor, float]], elect: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of the adapters' positions, and the weighted sum of their values there.

    Args:
        part: (positions, values, weight) of each adapter.
        elect: as in ties, use only the values with the sign of their unweighted sum, and return their mean.
    """
    flat, index = torch.cat([flat for flat, _, _ in part]).unique(return_inverse=True)
    values = torch.cat([values for _, values, _ in part])
    weighted = torch.cat([values * weight for _, values, weight in part])
    if not elect:
        return flat, torch.zeros(flat.numel()).index_add_(0, index, weighted)
    total = torch.zeros(flat.numel()).index_add_(0, index, values)
    agrees = values.sign() == torch.where(total >= 0, 1.0, -1.0)[index]
    agreeing = torch.zeros_like(total).index_add_(0, index, weighted * agrees)
    counts = torch.zeros_like(total).index_add_(0, index, agrees.float())
    return flat, agreeing / counts.clamp(min=1)


def _weighted_mean(parts: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    total = sum(map(abs, weights))
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: sum(p[name].float() * (abs(w) / total) for p, w in zip(parts, weights, strict=True)).to(
            parts[0][name].dtype
        )
        for name in names
    }


def _dtype(adapters: Sequence[Adapter], name: str) -> torch.dtype:
    dtypes = {adapter.deltas[name].dtype for adapter in adapters if name in adapter.deltas}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _check_settings(
    adapters: Sequence[Adapter], weights: Sequence[float], combination_type: str, density: float
) -> None:
    if len(weights) != len(adapters):
        raise UserError(f"weights: {len(weights)} for {len(adapters)} adapters; pass one for each")
    if not adapters or not all(map(math.isfinite, weights)) or not any(weights):
        raise UserError("weights: pass finite numbers that are not all zero, for at least one adapter")
    if combination_type not in get_args(CombinationType):
        raise UserError(f"combination_type: '{combination_type}'; known: {', '.join(get_args(CombinationType))}")
    if not 0 < density <= 1:
        raise UserError(
            f"density: {density:g}; pass the fraction of each adapter's deltas to keep, above 0 and at most 1"
        )


def _check_compatible(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    first = adapters[0]
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        pair = f"{names[0]} and {name}"
        if odd := differing_parameters(first.config.base_fingerprint, adapter.config.base_fingerprint):
            raise UserError(
                f"{pair}: trained on different base models, {first.config.base_model_name_or_path} and "
                f"{adapter.config.base_model_name_or_path} ('{odd[0]}' differs); only adapters of the same base model "
                "can be combined"
            )
        for kind, one, other in (
            ("fully trained parameters", _shapes(first.whole), _shapes(adapter.whole)),
            ("fully trained tokens", _shapes(first.rows), _shapes(adapter.rows)),
            ("new tokens", first.config.new_tokens, adapter.config.new_tokens),
            ("labels", first.config.model_settings.get("id2label"), adapter.config.model_settings.get("id2label")),
        ):
            if one != other:
                raise UserError(f"{pair}: they have different {kind} ({one} and {other}), which cannot be combined")
        for entry in first.config.tensors.keys() & adapter.config.tensors.keys():
            one, other = first.config.tensors[entry], adapter.config.tensors[entry]
            if (one.shape, one.whole_rows) != (other.shape, other.whole_rows):
                raise UserError(f"{pair}: '{entry}' has a different shape or different fully trained rows in each")


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
