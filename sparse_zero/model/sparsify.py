"""`sparsify` makes a small random subset of a model's scalars trainable. Also here: merge, unload, disable and scale.

The method is SpaRTA (https://arxiv.org/abs/2502.15975).
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import layers, sparse_model
from sparse_zero.model.fingerprint import fingerprint
from sparse_zero.model.sparsity import (
    Sparsity,
    check_not_sparse,
    read_tensors,
    set_state,
    sparsity_of,
    state_of,
    unwrap,
)
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight import BASE, Setting, SparseWeight
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection, in_chunks
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import all_targets, find_modules_to_save, parameter_names
from sparse_zero.selection.threads import map_in_threads
from sparse_zero.zero.parameters import gathered, is_partitioned, wait_for_prefetch

logger = logging.getLogger(__name__)

PositionChunks = Callable[[Selection, torch.device], Iterable[torch.Tensor]]
"""Returns the positions of a selection in chunks: int64, sorted, on the device."""

_CONTENTS = "_sparse_zero_contents"
"""The attribute of a model with its `SparseWeight.contents`."""


def sparsify(model: nn.Module, config: SparseConfig, positions: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Make a subset of a model's scalars trainable and freeze the others, in place.

    The outputs of the model do not change. Each selected weight W gets a trainable delta, a 1-D parameter with one
    value for each selected scalar, and the model computes with W[positions] = w0 + delta. The deltas start with zeros.
    Anything that optimises the parameters with `requires_grad` can train them: a PyTorch loop, Accelerate,
    transformers.Trainer, or deepspeed.initialize at any ZeRO stage. For models built under deepspeed.zero.Init, all
    ranks must call it.

        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        sparsify(model, SparseConfig(density=0.01))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        ...
        save_adapter(model, "adapter")

    Args:
        model: any module.
        config: which scalars to train, and how many.
        positions: train these scalars instead of those that the config's targets, budget and selection give. By
            parameter name: int64 (n,), indices into the flattened parameter.

    Returns: the same model.

    Raises:
        UserError: no weight to select from, a budget that cannot be met, a model that is sparse already, or positions
            that do not fit the model.
    """
    check_not_sparse(model)
    whole_modules = find_modules_to_save(model, config)
    selections, stored = select_scalars(model, config, whole_modules, positions)

    def chunks(selection: Selection, device: torch.device) -> Iterator[torch.Tensor]:
        return in_chunks(stored[selection.name].to(device)) if selection.name in stored else selection.chunks(device)

    whole = [*parameter_names(model, whole_modules), *_buffer_names(model, whole_modules)]
    return apply_selection(model, config, selections, whole, chunks)


def _buffer_names(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The names of all buffers in the given modules that a state dict contains."""
    return [
        f"{parent}.{name}" if parent else name
        for module in modules
        for parent, child in model.get_submodule(module).named_modules(prefix=module)
        for name in child._buffers.keys() - child._non_persistent_buffers_set
    ]


def apply_selection(
    model: nn.Module,
    config: SparseConfig,
    selections: Iterable[Selection],
    whole: Iterable[str],
    chunks: PositionChunks = Selection.chunks,
    base_fingerprint: dict[str, str] | None = None,
    deltas: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Make a model sparse with given selections. See `sparsify`.

    Args:
        model: the base model.
        config: how the deltas are trained, and what adapters save as their configuration.
        selections: the selection of each weight.
        whole: names of the parameters to train fully, and of the buffers to save with them.
        chunks: returns the positions of a selection.
        base_fingerprint: the fingerprint of the base model; None to compute it.
        deltas: (n,) by parameter name: initial deltas, which are written into the weights. Zeros for other weights.

    Returns: the same model.

    Raises:
        UserError: the model is sparse already, or `chunks` raised it. The model is then unchanged.
    """
    check_not_sparse(model)
    wait_for_prefetch(model)
    parameters = all_targets(model)
    selections, whole = list(selections), list(whole)
    if config.indices == "regenerated" and (
        stored := [selection.name for selection in selections if not selection.can_regenerate]
    ):
        logger.warning(
            "sparse.indices: the positions of %s cannot be regenerated: they are stored",
            ", ".join(stored),
        )
    with_new_rows = {selection.name for selection in selections if selection.whole_rows}
    contents = vars(model).setdefault(_CONTENTS, {})
    counter = StepCounter()
    weights = {
        selection.name: SparseWeight(parameters[selection.name], selection, counter, config, contents)
        for selection in selections
    }
    state = Sparsity(
        config=config,
        weights=weights,
        whole=[name for name in whole if name in parameters],
        buffers=[name for name in whole if name not in parameters],
        originals=read_tensors(model, whole),
        total_parameters=sum(target.shape.numel() for target in parameters.values()),
        selected_parameters=sum(selection.count for selection in selections),
        whole_parameters=sum(parameters[name].shape.numel() for name in whole if name in parameters),
        counter=counter,
        fingerprint=fingerprint(model, {*whole, *with_new_rows}) if base_fingerprint is None else base_fingerprint,
        required_grad={name: target.parameter.requires_grad for name, target in parameters.items()},
        base_model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
    )
    for weight in weights.values():
        layers.attach(weight)
    try:
        _initialize(weights, chunks, deltas or {})
    except UserError:
        for weight in weights.values():
            layers.detach(weight)
            contents.pop(weight.selection.name, None)
        raise
    _attach(model, state)
    return model


def _attach(model: nn.Module, state: Sparsity) -> None:
    """Make a model sparse whose weights are attached to their modules."""
    trained = {id(weight.delta): weight.delta.requires_grad for weight in state.weights.values()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(trained.get(id(parameter), name in state.whole))
    sparse_model.attach(model)
    set_state(model, state)
    state.hooks = [model.register_forward_pre_hook(sparse_model.before_forward)]
    state.has_leaf_hooks = False


def _detach(model: nn.Module, state: Sparsity) -> None:
    """Make a plain model of it again, which keeps the values that it has."""
    sparse_model.detach(model)
    for weight in state.weights.values():
        layers.detach(weight)
    for hook in state.hooks:
        hook.remove()
    state.hooks = []
    set_state(model, None)
    for name, parameter in model.named_parameters():
        if name in state.required_grad and parameter.is_floating_point():
            parameter.requires_grad_(state.required_grad[name])


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
    for weight in state.weights.values():
        layers.attach(weight)
        weight.invalidate()
    _attach(model, state)
    state.disabled = disabled
    if not disabled:
        state.put_in(model)


def _write_partitions(state: Sparsity, setting: Setting | None = None) -> None:
    """Write the weights that ZeRO stage 3 partitions, so that the partitions get the values."""
    for weight in state.weights.values():
        if is_partitioned(weight.weight):
            with gathered([weight.weight, weight.delta], write=True):
                weight.write(setting)


def _initialize(
    weights: Mapping[str, SparseWeight], chunks: PositionChunks, deltas: Mapping[str, torch.Tensor]
) -> None:
    """Initialize the weights. If `chunks` raises an error, restore their values and raise it again."""

    def initialize(name: str) -> None:
        weight = weights[name]
        weight.initialize(chunks(weight.selection, weight.weight.device), deltas.get(name))

    # ZeRO stage 3 must gather in the same order on all ranks, and an accelerator gains nothing from threads
    sequential = any(is_partitioned(w.weight) or w.weight.device.type != "cpu" for w in weights.values())
    try:
        if sequential:
            for name in weights:
                initialize(name)
        else:
            map_in_threads(initialize, weights)
    except UserError:
        for weight in weights.values():
            if weight.is_written:
                weight.write(BASE)
        raise


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Write the deltas into the weights and remove everything else that `sparsify` added, in place.

    The result is a plain model, e.g. for `save_pretrained`. It cannot be undone; see `merge_adapter`. Inactive
    adapters are removed: they belong to the base model. Under ZeRO stage 3, all ranks must call it, and the model
    stays partitioned.

    Args:
        model: a sparse model, which may be wrapped.

    Returns: the model, without wrappers.

    Raises:
        UserError: the model is not sparse.
    """
    model = unwrap(model)
    merge(model)
    return _forget(model)


def merge(model: nn.Module) -> Sparsity:
    """Make a plain model with the trained values, also within `disable_adapter`. `unmerge` undoes it.

    Args: model: a sparse model without wrappers.

    Returns: its state. Under ZeRO stage 3, all ranks must call it.
    """
    state = sparsity_of(model)
    wait_for_prefetch(model)
    if state.disabled:
        state.disabled = 0
        state.put_in(model)
    for weight in state.weights.values():
        weight.refresh_at_rest(checks_data=True)
    _write_partitions(state)
    _detach(model, state)
    for name in state.weights:  # what the parameters contain is now the base of other adapters
        state.contents.pop(name, None)
    return state


def unmerge(model: nn.Module, state: Sparsity) -> None:
    """Make a sparse model again. Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a plain model without wrappers.
        state: what `merge` returned.
    """
    wait_for_prefetch(model)
    for weight in state.weights.values():
        layers.attach(weight)
        weight.invalidate()
    _write_partitions(state, BASE)
    _attach(model, state)
    sparse_model.refresh(model)


def unload(model: nn.Module) -> nn.Module:
    """Restore the base model's weights bit for bit and remove everything that `sparsify` added, in place.

    Inactive adapters are removed, too. Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a sparse model, which may be wrapped.

    Returns: the model, without wrappers.

    Raises:
        UserError: the model is not sparse.
    """
    model = unwrap(model)
    deactivate(model)
    return _forget(model)


def _forget(model: nn.Module) -> nn.Module:
    """Remove what belongs to all adapters of a model."""
    for name in (_CONTENTS, "inactive_adapters"):
        vars(model).pop(name, None)
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes with its original weights, those of fully trained modules included.

        with disable_adapter(model):
            reference = model(**batch).logits

    Saving, loading, switching, merging and unloading give the same within it as outside. Under ZeRO stage 3, all
    ranks must enter and leave it.

    Args:
        model: a sparse model, which may be wrapped.

    Raises:
        UserError: the model is not sparse.
    """
    model = unwrap(model)
    wait_for_prefetch(model)
    sparsity_of(model).disable(model)
    try:
        yield
    finally:
        # The state may be that of another adapter now, and the model may have been merged
        if (state := state_of(model)) is not None and state.disabled:
            state.enable(model)


def set_scale(model: nn.Module, scale: float) -> None:
    """Scale the deltas: W[positions] = w0 + scale * delta. Fully trained modules are not scaled.

    Args:
        model: a sparse model, which may be wrapped.
        scale: 1 for the trained values, 0 for the original values of the selected scalars.

    Raises:
        UserError: the model is not sparse.
    """
    for weight in sparsity_of(model).weights.values():
        weight.scale = float(scale)
    sparse_model.refresh(unwrap(model))
