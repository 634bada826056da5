"""Several adapters on one model, and merging that can be undone. PEFT's verbs; for inference, or between trainings:
an optimizer that was built before a switch still holds the deltas of the adapter before.

One adapter is active: its deltas are in the weights. The others are kept on the CPU, as they would be saved.
Under ZeRO stage 3 every rank must call these functions.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.save_and_load import collect, put_on
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.model.sparsify import merge_and_unload, sparsity_of, unload, unwrap
from sparse_zero.zero.parameters import gathered, wait_for_prefetch


@dataclass
class Merged:
    """An adapter whose values are in the weights for good, and what the weights held before."""

    name: str
    adapter: Adapter
    base: dict[str, torch.Tensor]
    """(n,) of each selected weight, on the CPU."""
    originals: dict[str, torch.Tensor]


def adapter_names(model: nn.Module) -> list[str]:
    """The active adapter's name, then those of the others."""
    return [sparsity_of(model).name, *_parked(unwrap(model))]


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make another of the model's adapters the active one. In place; costs as much as the adapters are large.

    Raises UserError: no adapter of this name.
    """
    inner = unwrap(model)
    active, parked = sparsity_of(model), _parked(inner)
    if adapter_name == active.name:
        return
    if not isinstance(adapter_name, str):
        raise UserError("one adapter is active at a time: combine_adapters makes one of several")
    if adapter_name not in parked:
        raise _absent(model, adapter_name)
    current = collect(inner)
    unload(inner)
    put_on(inner, parked[adapter_name], adapter_name, adapter_name)
    del parked[adapter_name]
    parked[active.name] = current


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget one of the adapters that are not active. Raises UserError: it is active, or not there."""
    parked = _parked(unwrap(model))
    if adapter_name == sparsity_of(model).name:
        raise UserError(f"'{adapter_name}' is the active adapter: call set_adapter(model, another) or unload(model)")
    if parked.pop(adapter_name, None) is None:
        raise _absent(model, adapter_name)


def merge_adapter(model: nn.Module) -> None:
    """Write the active adapter's values into the weights; the model's modules are plain again. In place.

    `unmerge_adapter` takes it back, bit for bit.
    """
    inner = unwrap(model)
    sparsity = sparsity_of(model)
    base = {name: weight.base.cpu() for name, weight in sparsity.weights.items()}
    merged = Merged(sparsity.name, collect(inner), base, sparsity.originals)
    merge_and_unload(inner)
    inner.merged_adapter = merged


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> None:
    """Give the base model its weights back, bit for bit, and put the adapter on them as it was. In place.

    Raises UserError: nothing was merged by `merge_adapter`.
    """
    inner = unwrap(model)
    merged: Merged | None = inner.__dict__.pop("merged_adapter", None)
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
    put_on(inner, merged.adapter, merged.name, merged.name)


def _absent(model: nn.Module, adapter_name: str) -> UserError:
    names = adapter_names(model)
    hint = did_you_mean(adapter_name, names) or f"; there: {', '.join(names)}"
    return UserError(f"no adapter '{adapter_name}' on this model{hint}")


def _parked(inner: nn.Module) -> dict[str, Adapter]:
    return inner.__dict__.setdefault("parked_adapters", {})
