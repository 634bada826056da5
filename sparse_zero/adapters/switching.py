"""Several adapters on one model, and reversible merging. The functions are named as in PEFT.

    load_adapter(model, "adapters/chat")                    # the active adapter, "default"
    load_adapter(model, "adapters/code", adapter_name="code")
    set_adapter(model, "code")

One adapter is active: its deltas are in the weights. The others are in CPU memory. Create a new optimizer after a
switch: an older one has the deltas of the adapter before. Under ZeRO stage 3, all ranks must call these functions.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.save_and_load import apply_adapter, extract_adapter
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.model.sparsify import merge_and_unload, sparsity_of, unload
from sparse_zero.model.wrappers import unwrap
from sparse_zero.zero.parameters import gathered, wait_for_prefetch


@dataclass
class MergedAdapter:
    """A merged adapter, and the original values that `unmerge_adapter` restores."""

    name: str
    adapter: Adapter
    base: dict[str, torch.Tensor]
    """The original values of the selected scalars, (n,) of each weight, on the CPU."""
    originals: dict[str, torch.Tensor]
    """The original values of fully trained parameters."""


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters: the active one first.

    Args:
        model: a sparse model, which may be wrapped.

    Raises:
        UserError: the model is not sparse.
    """
    return [sparsity_of(model).name, *_inactive(unwrap(model))]


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Activate one of the model's adapters, in place. The time depends on the sizes of the two adapters only.

    Args:
        model: a sparse model, which may be wrapped.
        adapter_name: the name given to `load_adapter`.

    Raises:
        UserError: the model has no adapter of this name, or is not sparse.
    """
    inner = unwrap(model)
    active, inactive = sparsity_of(model), _inactive(inner)
    if adapter_name == active.name:
        return
    if not isinstance(adapter_name, str):
        raise UserError("set_adapter activates one adapter; combine_adapters makes one of several")
    if adapter_name not in inactive:
        raise _unknown_name(model, adapter_name)
    current = extract_adapter(inner)
    unload(inner)
    apply_adapter(inner, inactive[adapter_name], adapter_name, adapter_name)
    del inactive[adapter_name]
    inactive[active.name] = current


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an inactive adapter of the model.

    Args:
        model: a sparse model, which may be wrapped.
        adapter_name: the name given to `load_adapter`.

    Raises:
        UserError: the adapter is active or does not exist, or the model is not sparse.
    """
    inactive = _inactive(unwrap(model))
    if adapter_name == sparsity_of(model).name:
        raise UserError(
            f"'{adapter_name}' is the active adapter: first activate another with set_adapter, or call unload(model)"
        )
    if inactive.pop(adapter_name, None) is None:
        raise _unknown_name(model, adapter_name)


def merge_adapter(model: nn.Module, force: bool = False) -> None:
    """Merge the active adapter into the weights, in place. `unmerge_adapter` undoes it bit for bit.

    The model then consists of plain modules, as after `merge_and_unload`, and needs CPU memory for the adapter and the
    original values.

    Args:
        model: a sparse model, which may be wrapped.
        force: merge values that are NaN or infinite, too.

    Raises:
        UserError: the model is not sparse, or a trained value is NaN or infinite. The model is then unchanged.
    """
    inner = unwrap(model)
    sparsity = sparsity_of(model)
    base = {name: weight.base.cpu() for name, weight in sparsity.weights.items()}
    merged = MergedAdapter(sparsity.name, extract_adapter(inner), base, sparsity.originals)
    merge_and_unload(inner, force)
    inner.merged_adapter = merged


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`, in place: restore the base model's weights bit for bit, and apply the adapter to them.

    Args:
        model: a model after `merge_adapter`, which may be wrapped.

    Raises:
        UserError: the model has no adapter that `merge_adapter` merged.
    """
    inner = unwrap(model)
    merged: MergedAdapter | None = inner.__dict__.pop("merged_adapter", None)
    if merged is None:
        raise UserError("nothing to unmerge: call merge_adapter(model) first")
    wait_for_prefetch(inner)
    parameters = dict(inner.named_parameters())
    for name, base in merged.base.items():
        flat = merged.adapter.positions(name, base.device)
        with gathered([parameters[name]], write=True):
            whole = parameters[name].detach()
            whole.view(-1).index_copy_(0, flat.to(whole.device), base.to(whole.device))
    for name, values in merged.originals.items():
        with gathered([parameters[name]], write=True):
            parameters[name].copy_(values)
    apply_adapter(inner, merged.adapter, merged.name, merged.name)


def _unknown_name(model: nn.Module, adapter_name: str) -> UserError:
    names = adapter_names(model)
    hint = did_you_mean(adapter_name, names) or f"; its adapters: {', '.join(names)}"
    return UserError(f"the model has no adapter '{adapter_name}'{hint}")


def _inactive(inner: nn.Module) -> dict[str, Adapter]:
    return inner.__dict__.setdefault("inactive_adapters", {})
