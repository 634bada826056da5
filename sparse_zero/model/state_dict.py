"""The state dict of a sparse module: what it contains, and what loading it means.

For a selected parameter `weight` it contains
    weight             the weight with the deltas, so that a plain model can load it
    weight_delta       (n,)
    weight_base        (n,), w0: the original values
    weight_positions   int64 (): a checksum of the positions, so that deltas are not loaded at other positions
Loading all of them gives the saved state, whatever the model had before. Loading `weight` alone, as from a plain
model's state dict, gives other original values; the deltas stay. Loading `weight_delta` alone gives other deltas.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sparse_zero.model import writes
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.weight_values import add_delta
from sparse_zero.zero.parameters import is_partitioned

_CHECKSUM = "positions"


def refresh(weights: Mapping[str, TrainedDelta]) -> None:
    """Write the deltas of a module before its state dict is made."""
    writes.refresh(weights.values(), checks_data=True)


def add_checksums(weights: Mapping[str, TrainedDelta], destination: dict[str, Any], prefix: str) -> None:
    """Add `weight_positions` to a state dict: for each module of a tied weight, as `weight_delta`."""
    for key, weight in _checksum_keys(weights, prefix):
        destination[key] = _checksum(weight)


@contextmanager
def loading(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> Iterator[bool]:
    """A context in which the tensors of a module are loaded from a state dict. See Module._load_from_state_dict.

    Gives: whether the state dict fits. If it does not, the reason is added to `errors` and nothing must be loaded.
    """
    weights: dict[str, TrainedDelta] = module.sparse_weights
    refused = [error for name, weight in weights.items() if (error := _refusal(module, weight, name, state, prefix))]
    if refused:
        errors += refused
        yield False
        return
    # With assign=True parameters are assigned, as a user may do, whose values would be the original ones
    for weight in weights.values():
        weight.is_loading = True
    try:
        yield True
    finally:
        for weight in weights.values():
            weight.is_loading = False
    for key, _ in _checksum_keys(weights, prefix):
        if key in unexpected:
            unexpected.remove(key)
    for name, weight in weights.items():
        weight_key, delta_key, base_key = _keys(weight, name, prefix)
        _share_among_owners(weight)
        if weight.is_packed or is_partitioned(weight.weight):
            continue
        if base_key in state:
            weight.base_has_changed = True
        elif weight_key in state and delta_key not in state:
            weight.take_base()
        elif base_key in missing and delta_key in state:
            missing.remove(base_key)
        weight.invalidate()
        weight.refresh_at_rest()  # for readers that go around the modules, and compiled models


def refusals(weights: Mapping[str, TrainedDelta], state: dict[str, Any], prefix: str) -> list[str]:
    """Why a state dict does not fit a sparse model. Before any module is loaded, so that nothing is.

    Args: weights: by their names in the model.
    """
    found = []
    for full_name, weight in weights.items():
        module, name = weight.owners[0]
        path = prefix + full_name.removesuffix(name)
        if full_name.endswith(name) and (error := _refusal(module, weight, name, state, path)):
            found.append(error)
    return found


def _refusal(module: Any, weight: TrainedDelta, name: str, state: dict[str, Any], prefix: str) -> str | None:
    weight_key, delta_key, base_key = _keys(weight, name, prefix)
    expected = state.get(weight_key.removesuffix(name) + weight.tensor_name(name, _CHECKSUM))
    if expected is not None and int(expected) != int(_checksum(weight)):
        return (
            f"{weight_key}: was saved with another selection (seed, density or targets), so its deltas belong to "
            "other positions; sparsify with the same SparseConfig"
        )
    if weight.is_packed:
        return weight.refusal_of(state, weight_key)
    given = state.get(delta_key), state.get(weight_key)
    is_first = (module, name) == weight.owners[0]  # only the first module of a tied weight has the original values
    if base_key in state or not is_first or any(tensor is None for tensor in given) or is_partitioned(weight.weight):
        return None
    # A state dict of version 0.1, which has no original values: right if this model has the same
    delta, values = (tensor.to(weight.base.device) for tensor in given)
    if delta.shape != weight.delta.shape or values.shape != weight.weight.shape:
        return None  # torch says what does not fit
    at = values.reshape(-1).index_select(0, weight.flat_positions())
    if _is_sum(weight, at, delta):
        return None
    return (
        f"{weight_key}: the state dict has deltas without the original values ({base_key}), and this model has "
        "others; sparsify the base model that it was saved from, or load the adapter"
    )


def _is_sum(weight: TrainedDelta, values: torch.Tensor, delta: torch.Tensor) -> bool:
    """Whether the values are the original ones of the model plus the given deltas, or the original ones."""
    base, values = weight.base, values.to(weight.base.dtype)
    return torch.equal(values, add_delta(base, delta).to(base.dtype)) or torch.equal(values, base)


def _share_among_owners(weight: TrainedDelta) -> None:
    """After a load with assign=True each module of a tied weight has its own parameters."""
    (module, name), *others = weight.owners
    for owner, other_name in others:
        owner._parameters[other_name] = module._parameters[name]
        owner._parameters[weight.tensor_name(other_name, "delta")] = weight.delta


def _keys(weight: TrainedDelta, name: str, prefix: str) -> tuple[str, str, str]:
    """The keys of the weight, the deltas and the original values."""
    return f"{prefix}{name}", prefix + weight.tensor_name(name, "delta"), prefix + weight.tensor_name(name, "base")


def _checksum_keys(weights: Mapping[str, TrainedDelta], prefix: str) -> Iterator[tuple[str, TrainedDelta]]:
    for name, weight in weights.items():
        yield prefix + weight.tensor_name(name, _CHECKSUM), weight


def _checksum(weight: TrainedDelta) -> torch.Tensor:
    return torch.tensor(int(weight.checksum[:15], 16))
