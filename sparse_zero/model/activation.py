"""A model becomes sparse with a state, plain again, and sparse again with the same or another state.

The state is not in the model between `deactivate` and `activate`, or between `merge` and `unmerge`. It keeps the
deltas, which are the same parameters afterwards.
"""

from collections.abc import Iterator

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import layers, sparse_model, subclassed, writes
from sparse_zero.model.finite import count_not_finite, describe
from sparse_zero.model.setting import BASE, Setting
from sparse_zero.model.sparsity import Sparsity, read_values, set_state, sparsity_of
from sparse_zero.model.wrappers import tensors_by_name
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.zero.parameters import gathered, wait_for_prefetch

CONTENTS = "_sparse_zero_contents"
"""The attribute of a model with its `SparseWeight.contents`."""

HAS_ADAPTER = "_hf_peft_config_loaded"
"""By this attribute transformers' Trainer knows that a quantised model has an adapter that it can train."""


def attach(model: nn.Module, state: Sparsity) -> None:
    """Make a model sparse whose weights are attached to their modules."""
    trained = {id(weight.delta): weight.delta.requires_grad for weight in state.weights.values()}
    for name, parameter in tensors_by_name(model).items():
        wanted = trained.get(id(parameter), name in state.whole)
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
    sparse_model.attach(model)
    set_state(model, state)
    state.packed_layers = [layer for _, layer in quantized_layers(model)]
    for layer in state.packed_layers:
        layer.forbid_repacking()
    subclassed.leave_out(model)
    if getattr(model, "is_quantized", False):
        vars(model)[HAS_ADAPTER] = True
    state.hooks = [model.register_forward_pre_hook(sparse_model.before_forward)]
    state.has_leaf_hooks = False


def _detach(model: nn.Module, state: Sparsity) -> None:
    """Make a plain model of it again, which keeps the values that it has."""
    sparse_model.detach(model)
    if "peft_config" not in vars(model):  # else it is set by transformers' own add_adapter
        vars(model).pop(HAS_ADAPTER, None)
    for weight in state.weights.values():
        layers.detach(weight)
    for layer in state.packed_layers:
        layer.allow_repacking()
    subclassed.take_in(model)
    state.packed_layers = []
    for hook in state.hooks:
        hook.remove()
    state.hooks = []
    set_state(model, None)
    for name, parameter in model.named_parameters():
        before = state.required_grad.get(name, parameter.requires_grad)
        if parameter.requires_grad != before and not parameter.is_inference():
            parameter.requires_grad_(before)


def deactivate(model: nn.Module) -> Sparsity:
    """Make a plain model with the original weights. `activate` undoes it. Under ZeRO stage 3, all ranks must call it.

    Args: model: a sparse model without wrappers.

    Returns: the state, which keeps the deltas, the original values and the positions, on the model's device, and the
        trained values of fully trained parameters, on the CPU.
    """
    state = sparsity_of(model)
    wait_for_prefetch(model)
    if not state.disabled:
        state.take_out(model)
    _write_partitions(state, BASE)
    _detach(model, state)
    for name in state.weights:
        state.contents.pop(name, None)
    return state


def activate(model: nn.Module, state: Sparsity, disabled: int = 0) -> None:
    """Make a model sparse again with a state of it. Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a plain model without wrappers, with the original weights.
        state: what `deactivate` returned.
        disabled: the number of `disable_adapter` blocks that the model is in.
    """
    wait_for_prefetch(model)
    # Other weights may have been loaded while another adapter was active
    for weight in state.weights.values():
        layers.attach(weight)
        weight.invalidate()
        weight.take_changed_base()
    state.originals = read_values(model, state.trained_names)
    attach(model, state)
    state.disabled = disabled
    if disabled:
        state.freeze(model)
    else:
        state.put_in(model)


def _write_partitions(state: Sparsity, setting: Setting | None = None) -> None:
    """Write the weights that ZeRO stage 3 partitions, so that the partitions get the values."""
    for weight in state.weights.values():
        weight.write_partition(setting)


def merge(model: nn.Module, force: bool) -> Sparsity:
    """Make a plain model with the trained values, also within `disable_adapter`. `unmerge` undoes it.

    Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a sparse model without wrappers.
        force: merge values that are NaN or infinite, too.

    Returns: its state.

    Raises:
        UserError: the model is not sparse, or a trained value is NaN or infinite. The model is then unchanged.
    """
    state = sparsity_of(model)
    wait_for_prefetch(model)
    if not force and (counts := count_not_finite(_trained_values(model, state))):
        raise UserError(
            f"NaN or infinite: {describe(counts)}; the training diverged: load an earlier checkpoint or adapter, or "
            "merge it as it is with force=True (sparse-zero merge --force)"
        )
    if state.disabled:
        state.disabled = 0
        state.put_in(model)
    writes.refresh(state.weights.values(), checks_data=True)
    _write_partitions(state)
    _detach(model, state)
    for name, weight in state.weights.items():  # what the parameters contain is now the base of other adapters
        state.contents.pop(name, None)
        weight.is_plain = True
    return state


def _trained_values(model: nn.Module, state: Sparsity) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained values by name, each gathered while it is yielded. Collective under ZeRO stage 3."""
    for name, weight in state.weights.items():
        with gathered([weight.delta]):
            yield name, weight.delta
    yield from state.trained_values(model)


def unmerge(model: nn.Module, state: Sparsity) -> None:
    """Make a sparse model again. Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a plain model without wrappers.
        state: what `merge` returned.
    """
    wait_for_prefetch(model)
    for weight in state.weights.values():
        layers.attach(weight)
        weight.is_plain = False
        weight.invalidate()
    _write_partitions(state, BASE)
    attach(model, state)
    sparse_model.refresh(model)
