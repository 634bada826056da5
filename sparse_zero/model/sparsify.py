"""`sparsify`: freeze a model but for a random subset of its scalars, and take that back, merge it or pause it."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import layers
from sparse_zero.model.fingerprint import fingerprint
from sparse_zero.model.weight import SparseWeight, UpdateClock
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection, in_chunks
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import all_targets, find_modules_to_save, parameter_names
from sparse_zero.selection.threads import map_in_threads
from sparse_zero.zero.parameters import gathered, is_partitioned, require_grad_on_leaf_inputs, wait_for_prefetch

logger = logging.getLogger(__name__)

Chunks = Callable[[Selection, torch.device], Iterable[torch.Tensor]]


@dataclass
class Sparsity:
    """What `sparsify` did to a model. Held by the model as `model.sparsity`."""

    config: SparseConfig
    weights: dict[str, SparseWeight]
    """The selected weights by parameter name, as in the base model's state dict."""
    whole: list[str]
    """Names of the parameters that are trained whole."""
    originals: dict[str, torch.Tensor] = field(repr=False)
    """What these held before, on the CPU."""
    total_parameters: int
    """Scalars of the base model, tied ones once."""
    selected_parameters: int
    whole_parameters: int
    clock: UpdateClock = field(repr=False)
    fingerprint: dict[str, str] = field(repr=False)
    """Of the base model; adapters carry it."""
    name: str = "default"
    """Of the adapter, where a model has several."""
    base_model: str | None = None
    """Where the base model came from: a hub id, a directory or package://...; adapters carry it."""
    revision: str | None = None
    tokenizer: str | None = None
    """Where the tokenizer came from, if not from the base model."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens that were added to it."""
    results: dict[str, Any] = field(default_factory=dict)
    """Figures of the run that trained it, for the model card."""
    hooks: list[Any] = field(default_factory=list, repr=False)
    leaves_settled: bool = False

    @property
    def trainable_parameters(self) -> int:
        return self.selected_parameters + self.whole_parameters


def sparsify(model: nn.Module, config: SparseConfig, positions: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Make a part of the model's scalars trainable and freeze the rest, in place.

    The result computes what it did before, and is trained by anything that trains `parameters()` which require a
    gradient: a plain torch loop, Accelerate, deepspeed.initialize at any ZeRO stage, transformers.Trainer.
    Works on models built under deepspeed.zero.Init (every rank must call it).

    Args: positions: int64 (n,) by parameter name, indices into the flattened parameters: train these scalars, whatever
        the config says of targets, budget and selection.
    Returns: the same model. Raises UserError: nothing to select from, an impossible budget, a model that already is
    sparse, positions that do not fit.
    """
    refuse_sparse(model)
    whole_modules = find_modules_to_save(model, config)
    selections, stored = select_scalars(model, config, whole_modules, positions)

    def chunks(selection: Selection, device: torch.device) -> Iterator[torch.Tensor]:
        return in_chunks(stored[selection.name].to(device)) if selection.name in stored else selection.chunks(device)

    return attach(model, config, selections, parameter_names(model, whole_modules), chunks)


def attach(
    model: nn.Module,
    config: SparseConfig,
    selections: Iterable[Selection],
    whole: list[str],
    chunks: Chunks = Selection.chunks,
    base_fingerprint: dict[str, str] | None = None,
    deltas: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """`sparsify` with everything decided: what is drawn from which weights, and the parameters trained whole.

    Args: chunks: the positions of a draw, int64, sorted, some at a time; deltas: (n,) of weights that start with
        these, which are written into them; the others start with zeros.
    Raises UserError where the model is sparse already, and what `chunks` raises, with the model as it was.
    """
    refuse_sparse(model)
    wait_for_prefetch(model)
    parameters = all_targets(model)
    selections = list(selections)
    if config.indices == "regenerated" and (
        kept := [selection.name for selection in selections if not selection.can_regenerate]
    ):
        logger.warning(
            "sparse.indices: regenerated: no rule draws the positions of %s: they are stored", ", ".join(kept)
        )
    total = sum(target.shape.numel() for target in parameters.values())
    with_new_rows = {selection.name for selection in selections if selection.whole_rows}
    base = fingerprint(model, {*whole, *with_new_rows}) if base_fingerprint is None else base_fingerprint
    originals = {name: _copy(parameters[name].parameter) for name in whole}
    clock = UpdateClock()
    weights = {
        selection.name: layers.attach(parameters[selection.name], selection, clock, config) for selection in selections
    }
    try:
        _begin(weights, chunks, deltas or {})
    except UserError:
        for weight in weights.values():
            layers.detach(weight)
        raise
    trained = {id(weight.delta) for weight in weights.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for name in whole:
        parameters[name].parameter.requires_grad_(True)
    model.sparsity = Sparsity(
        config=config,
        weights=weights,
        whole=whole,
        originals=originals,
        total_parameters=total,
        selected_parameters=sum(selection.count for selection in selections),
        whole_parameters=sum(parameters[name].shape.numel() for name in whole),
        clock=clock,
        fingerprint=base,
        base_model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
        hooks=[model.register_forward_pre_hook(clock.before_forward), model.register_forward_pre_hook(_settle_leaves)],
    )
    return model


def _begin(weights: Mapping[str, SparseWeight], chunks: Chunks, deltas: Mapping[str, torch.Tensor]) -> None:
    """Raises what `chunks` raises, with the weights as they were."""

    def begin(name: str) -> None:
        weight = weights[name]
        weight.begin(chunks(weight.selection, weight.weight.device), deltas.get(name))

    # Stage 3 gathers in one order on every rank, and an accelerator's work is queued
    alone = any(is_partitioned(w.weight) or w.weight.device.type != "cpu" for w in weights.values())
    try:
        if alone:
            for name in weights:
                begin(name)
        else:
            map_in_threads(begin, weights)
    except UserError:
        for weight in weights.values():
            if weight.is_written:
                weight.enabled = False
                weight.write()
        raise


def _settle_leaves(model: nn.Module, _: Any) -> None:
    """DeepSpeed decides on leaf modules, after `sparsify`: the first forward on a partitioned base knows them."""
    sparsity = model.sparsity
    partitioned = any(is_partitioned(weight.weight) for weight in sparsity.weights.values())
    if partitioned and not sparsity.leaves_settled:
        sparsity.hooks += require_grad_on_leaf_inputs(model)
        sparsity.leaves_settled = True


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    with gathered([parameter]):
        return parameter.detach().to("cpu", copy=True)


def refuse_sparse(model: nn.Module) -> None:
    """Raises UserError where the model is sparse."""
    if hasattr(model, "sparsity"):
        raise UserError("this model is sparse already: call merge_and_unload(model) or unload(model) first")


def sparsity_of(model: nn.Module) -> Sparsity:
    """The record that `sparsify` left on a model, also through the wrappers of DDP, Accelerate and DeepSpeed.

    Raises UserError where the model is not sparse.
    """
    inner = unwrap(model)
    if not hasattr(inner, "sparsity"):
        if "merged_adapter" in vars(inner):
            raise UserError(
                f"'{inner.merged_adapter.name}' is merged into this model: call unmerge_adapter(model) first"
            )
        raise UserError(f"{type(inner).__name__} is not sparse: call sparsify(model, SparseConfig(...)) first")
    return inner.sparsity


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers that hold it as `.module`."""
    # DeepSpeed's engine answers for its module's attributes, so hasattr would take it for the model
    while "sparsity" not in vars(model) and isinstance(model._modules.get("module"), nn.Module):
        model = model.module
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Write the deltas into the weights for good and remove everything that `sparsify` added. In place.

    Under ZeRO stage 3 every rank must call it; the pieces then hold the merged weights.
    """
    model = unwrap(model)
    wait_for_prefetch(model)
    for weight in sparsity_of(model).weights.values():
        with gathered([weight.weight, weight.delta], write=True):
            weight.write()
    return _remove(model)


def unload(model: nn.Module) -> nn.Module:
    """Give the base model's weights back, bit for bit, and remove everything that `sparsify` added. In place."""
    model = unwrap(model)
    with disable_adapter(model):
        for weight in model.sparsity.weights.values():
            with gathered([weight.weight], write=True):
                weight.write()
        # Taken out here, so that leaving the block does not bring the trained values back
        model.sparsity.whole.clear()
    return _remove(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes with its original weights, those of modules trained whole included.

    Under ZeRO stage 3 every rank must enter and leave it.
    """
    model = unwrap(model)
    sparsity = sparsity_of(model)
    wait_for_prefetch(model)
    parameters = dict(model.named_parameters())
    before = {weight: weight.enabled for weight in sparsity.weights.values()}
    trained = {name: _copy(parameters[name]) for name in sparsity.whole}
    for weight in before:
        weight.enabled = False
    _set(parameters, {name: sparsity.originals[name] for name in sparsity.whole})
    try:
        yield
    finally:
        for weight, enabled in before.items():
            weight.enabled = enabled
        _set(parameters, {name: trained[name] for name in sparsity.whole})


def set_scale(model: nn.Module, scale: float) -> None:
    """Let the deltas count `scale` times: W = w0 + scale * delta. Modules trained whole are not scaled."""
    for weight in sparsity_of(model).weights.values():
        weight.scale = float(scale)


@torch.no_grad()
def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        with gathered([parameters[name]], write=True):
            parameters[name].copy_(value)


def _remove(model: nn.Module) -> nn.Module:
    for weight in model.sparsity.weights.values():
        layers.detach(weight)
    for hook in model.sparsity.hooks:
        hook.remove()
    del model.sparsity
    return model.requires_grad_(True)
