"""The reference of preference training: what the model computed when the training began, without a second model.

    keep_reference(model)
    with reference_values(model):
        reference = model(**batch).logits

The reference of a new adapter is the base model. That of an adapter that was trained before is the adapter as it was:
its values at the n selected positions are kept, n scalars in the weights' dtype; of quantised weights its n deltas.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import disable_adapter
from sparse_zero.model.sparsity import read_values, sparsity_of
from sparse_zero.model.wrappers import unwrap
from sparse_zero.zero.parameters import gathered, wait_for_prefetch


@torch.no_grad()
def keep_reference(model: nn.Module) -> bool:
    """Make the present values of a model its reference. Under ZeRO stage 3, all ranks must call it.

    Args: model: a sparse model, which may be wrapped.

    Returns: whether values are kept. They are not if the adapter changes nothing yet.

    Raises UserError: the model is not sparse.
    """
    model = unwrap(model)
    state = sparsity_of(model)
    wait_for_prefetch(model)
    values, is_changed = {}, False
    for name, weight in state.weights.items():
        with gathered([weight.delta]):
            is_changed = is_changed or bool((weight.delta.detach() * weight.scale).count_nonzero())
            values[name] = weight.reference_now()
    whole = read_values(model, state.trained_names)
    is_changed = is_changed or any(not torch.equal(whole[name], state.originals[name]) for name in whole)
    for name, weight in state.weights.items():
        weight.reference = values[name] if is_changed else None
    state.reference = whole if is_changed else None
    return is_changed


@contextlib.contextmanager
def reference_values(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes with the values of its reference. Under ZeRO stage 3, all ranks must enter
    and leave it.

    Args: model: a sparse model, which may be wrapped.

    Raises UserError: the model is not sparse, or is in a block of `disable_adapter`.
    """
    model = unwrap(model)
    state = sparsity_of(model)
    if state.reference is not None and state.disabled:
        raise UserError("the reference is an adapter as it was loaded: leave disable_adapter first")
    versions = {weight: weight.version_at_rest() for weight in state.weights.values()}
    originals = state.originals
    if state.reference is not None:
        state.originals = state.reference
        for weight in versions:
            weight.shows_reference = True
    try:
        with disable_adapter(model):
            yield
    finally:
        state.originals = originals
        for weight, version in versions.items():
            weight.shows_reference = False
            # Readers of the weights that are not the model's own, such as TRL's head, save them themselves
            if version is not None and weight.version_at_rest() is not None:
                weight.set_version_at_rest(version)
