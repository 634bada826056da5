"""Several adapters on one model, and reversible merging. The functions are named as in PEFT.

    load_adapter(model, "adapters/chat")                    # the active adapter, "default"
    load_adapter(model, "adapters/code", adapter_name="code")
    set_adapter(model, "code")

One adapter is active: its deltas are in the weights. An adapter that was active keeps its deltas, the same parameters,
on the model's device: an optimizer that has them stays valid. A loaded adapter that was never active is in CPU memory.
Under ZeRO stage 3, all ranks must call these functions.
"""

from torch import nn

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.save_and_load import apply_adapter
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.model.activation import activate, deactivate, merge, unmerge
from sparse_zero.model.sparsity import Sparsity, check_not_sparse, sparsity_of
from sparse_zero.model.wrappers import unwrap


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
    next_one, disabled = inactive[adapter_name], active.disabled
    deactivate(inner)
    try:
        if isinstance(next_one, Sparsity):
            activate(inner, next_one, disabled)
        else:
            apply_adapter(inner, next_one, adapter_name, adapter_name)
            for _ in range(disabled):
                sparsity_of(inner).disable(inner)
    except UserError:
        activate(inner, active, disabled)
        raise
    del inactive[adapter_name]
    inactive[active.name] = active


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

    The model then consists of plain modules, as after `merge_and_unload`, and also keeps the deltas and the original
    values.

    Args:
        model: a sparse model, which may be wrapped.
        force: merge values that are NaN or infinite, too.

    Raises:
        UserError: the model is not sparse, a trained value is NaN or infinite, or a weight is quantised. The model is
            then unchanged.
    """
    inner = unwrap(model)
    if packed := [name for name, weight in sparsity_of(inner).weights.items() if weight.is_packed]:
        raise UserError(
            f"{packed[0]} is quantised, and nothing is written into it: merge_and_unload(model) makes a dequantised "
            "model, which cannot be undone"
        )
    vars(inner)["merged_adapter"] = merge(inner, force)


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`, in place: restore the base model's weights bit for bit, and apply the adapter to them.

    Args:
        model: a model after `merge_adapter`, which may be wrapped.

    Raises:
        UserError: the model has no adapter that `merge_adapter` merged, or it was made sparse again since.
    """
    inner = unwrap(model)
    if "merged_adapter" not in vars(inner):
        raise UserError("nothing to unmerge: call merge_adapter(model) first")
    check_not_sparse(inner)
    unmerge(inner, vars(inner).pop("merged_adapter"))


def _unknown_name(model: nn.Module, adapter_name: str) -> UserError:
    names = adapter_names(model)
    hint = did_you_mean(adapter_name, names) or f"; its adapters: {', '.join(names)}"
    return UserError(f"the model has no adapter '{adapter_name}'{hint}")


def _inactive(inner: nn.Module) -> dict[str, Adapter | Sparsity]:
    return vars(inner).setdefault("inactive_adapters", {})
