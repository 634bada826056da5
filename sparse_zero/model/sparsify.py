"""`sparsify` makes a small random subset of a model's scalars trainable. Also here: merge, unload, disable and scale.

The method is SpaRTA (https://arxiv.org/abs/2502.15975).
"""

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
from sparse_zero.model.finite import count_not_finite, describe
from sparse_zero.model.first_backward import FirstBackward
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight import SparseWeight
from sparse_zero.model.wrappers import check_wrappers, parameters_by_name, unwrap
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection, in_chunks
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import all_targets, find_modules_to_save, parameter_names
from sparse_zero.selection.threads import map_in_threads
from sparse_zero.selection.unsupported import check_model, check_supported
from sparse_zero.zero.parameters import gathered, is_partitioned, require_grad_on_leaf_inputs, wait_for_prefetch

logger = logging.getLogger(__name__)

PositionChunks = Callable[[Selection, torch.device], Iterable[torch.Tensor]]
"""Returns the positions of a selection in chunks: int64, sorted, on the device."""


@dataclass
class Sparsity:
    """The state of a sparse model, `model.sparsity`."""

    config: SparseConfig
    weights: dict[str, SparseWeight]
    """The selected weights by parameter name, as in the base model's state dict."""
    whole: list[str]
    """Names of the fully trained parameters."""
    originals: dict[str, torch.Tensor] = field(repr=False)
    """Their original values, on the CPU."""
    total_parameters: int
    """Number of scalars of the base model; tied parameters count once."""
    selected_parameters: int
    """Number of selected scalars."""
    whole_parameters: int
    """Number of scalars of the fully trained parameters."""
    counter: StepCounter = field(repr=False)
    fingerprint: dict[str, str] = field(repr=False)
    """The fingerprint of the base model; saved in adapters."""
    dtype: torch.dtype
    """The dtype of the base model, to which the fingerprint belongs."""
    name: str = "default"
    """The name of the active adapter."""
    base_model: str | None = None
    """The source of the base model: a hub id, a directory or package://...; saved in adapters."""
    revision: str | None = None
    tokenizer: str | None = None
    """The source of the tokenizer if it is not the base model."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens that were added to the tokenizer."""
    results: dict[str, Any] = field(default_factory=dict)
    """Metrics of the training run, for the model card."""
    hooks: list[Any] = field(default_factory=list, repr=False)
    """Handles of the hooks of the model and its parameters, removed by `unload`."""
    has_leaf_hooks: bool = False

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable scalars."""
        return self.selected_parameters + self.whole_parameters


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
        model: any module. It may be compiled, but not be wrapped in DDP or by DeepSpeed yet.
        config: which scalars to train, and how many.
        positions: train these scalars instead of those that the config's targets, budget and selection give. By
            parameter name: int64 (n,), indices into the flattened parameter.

    Returns: the same model.

    Raises:
        UserError: no weight to select from, a budget that cannot be met, a model that is sparse or sharded already, a
            parameter that cannot be trained, or positions that do not fit the model. The model is then unchanged.
    """
    check_wrappers(model)
    inner = unwrap(model)
    check_not_sparse(inner)
    check_model(inner)
    whole_modules = find_modules_to_save(inner, config)
    selections, stored = select_scalars(inner, config, whole_modules, positions)

    def chunks(selection: Selection, device: torch.device) -> Iterator[torch.Tensor]:
        return in_chunks(stored[selection.name].to(device)) if selection.name in stored else selection.chunks(device)

    apply_selection(inner, config, selections, parameter_names(inner, whole_modules), chunks)
    return model


@torch.inference_mode(False)  # a delta that is created under it could never be trained
def apply_selection(
    model: nn.Module,
    config: SparseConfig,
    selections: Iterable[Selection],
    whole: list[str],
    chunks: PositionChunks = Selection.chunks,
    base_fingerprint: dict[str, str] | None = None,
    deltas: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Make a model sparse with given selections. See `sparsify`.

    Args:
        model: the base model.
        config: how the deltas are trained, and what adapters save as their configuration.
        selections: the selection of each weight.
        whole: names of the parameters to train fully.
        chunks: returns the positions of a selection.
        base_fingerprint: the fingerprint of the base model; None to compute it.
        deltas: (n,) by parameter name: initial deltas, which are written into the weights. Zeros for other weights.

    Returns: the same model.

    Raises:
        UserError: the model is sparse already, a parameter cannot be trained, or `chunks` raised it. The model is then
            unchanged.
    """
    check_not_sparse(model)
    selections = list(selections)
    check_supported(model, [selection.name for selection in selections], whole)
    wait_for_prefetch(model)
    parameters = all_targets(model)
    if config.indices == "regenerated" and (
        stored := [selection.name for selection in selections if not selection.can_regenerate]
    ):
        logger.warning(
            "sparse.indices: the positions of %s cannot be regenerated: they are stored",
            ", ".join(stored),
        )
    total = sum(target.shape.numel() for target in parameters.values())
    with_new_rows = {selection.name for selection in selections if selection.whole_rows}
    base = fingerprint(model, {*whole, *with_new_rows}) if base_fingerprint is None else base_fingerprint
    originals = {name: _copy(parameters[name].parameter) for name in whole}
    counter = StepCounter()
    weights = {
        selection.name: layers.attach(parameters[selection.name], selection, counter, config)
        for selection in selections
    }
    try:
        _initialize(weights, chunks, deltas or {})
    except UserError:
        for weight in weights.values():
            layers.detach(weight)
        raise
    trained = {id(weight.delta) for weight in weights.values()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            parameter.requires_grad_(False)
    for name in whole:
        parameters[name].parameter.requires_grad_(True)
    deltas_and_whole = {name: weight.delta for name, weight in weights.items()}
    counter.watch = FirstBackward(deltas_and_whole | {name: parameters[name].parameter for name in whole})
    model.sparsity = Sparsity(
        config=config,
        weights=weights,
        whole=whole,
        originals=originals,
        total_parameters=total,
        selected_parameters=sum(selection.count for selection in selections),
        whole_parameters=sum(parameters[name].shape.numel() for name in whole),
        counter=counter,
        fingerprint=base,
        dtype=next((parameters[name].parameter.dtype for name in (*weights, *whole)), torch.float32),
        base_model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
        hooks=[
            *(model.register_forward_pre_hook(hook) for hook in (counter.before_forward, _add_leaf_hooks)),
            counter.watch,
        ],
    )
    return model


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
                weight.enabled = False
                weight.write()
        raise


def _add_leaf_hooks(model: nn.Module, _: Any) -> None:
    """A forward pre-hook that adds hooks to ZeRO's leaf modules. DeepSpeed chooses these after `sparsify`."""
    sparsity = model.sparsity
    partitioned = any(is_partitioned(weight.weight) for weight in sparsity.weights.values())
    if partitioned and not sparsity.has_leaf_hooks:
        sparsity.hooks += require_grad_on_leaf_inputs(model)
        sparsity.has_leaf_hooks = True


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    with gathered([parameter]):
        return parameter.detach().to("cpu", copy=True)


def check_not_sparse(model: nn.Module) -> None:
    """Raise UserError if the model is sparse."""
    if hasattr(model, "sparsity"):
        raise UserError("this model is sparse already: call merge_and_unload(model) or unload(model) first")


def sparsity_of(model: nn.Module) -> Sparsity:
    """The `Sparsity` of a model, which may be wrapped by DDP, Accelerate or DeepSpeed.

    Raises:
        UserError: the model is not sparse.
    """
    inner = unwrap(model)
    if not hasattr(inner, "sparsity"):
        if "merged_adapter" in vars(inner):
            raise UserError(
                f"'{inner.merged_adapter.name}' is merged into this model: call unmerge_adapter(model) first"
            )
        raise UserError(f"{type(inner).__name__} is not sparse: call sparsify(model, SparseConfig(...)) first")
    return inner.sparsity


def merge_and_unload(model: nn.Module, force: bool = False) -> nn.Module:
    """Write the deltas into the weights and remove everything else that `sparsify` added, in place.

    The result is a plain model, e.g. for `save_pretrained`. It cannot be undone; see `merge_adapter`. Under ZeRO stage
    3, all ranks must call it, and the model stays partitioned.

    Args:
        model: a sparse model, which may be wrapped.
        force: merge values that are NaN or infinite, too.

    Returns: the model, without wrappers.

    Raises:
        UserError: the model is not sparse, or a trained value is NaN or infinite. The model is then unchanged.
    """
    model = unwrap(model)
    sparsity = sparsity_of(model)
    wait_for_prefetch(model)
    if not force and (counts := count_not_finite(_trained_values(model))):
        raise UserError(
            f"NaN or infinite: {describe(counts)}; the training diverged: load an earlier checkpoint or adapter, or "
            "merge it as it is with force=True (sparse-zero merge --force)"
        )
    for weight in sparsity.weights.values():
        with gathered([weight.weight, weight.delta], write=True):
            weight.write()
    return _remove(model)


def _trained_values(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The deltas and the fully trained parameters by name, each gathered while it is yielded. Collective."""
    parameters = parameters_by_name(model)
    trained = {name: weight.delta for name, weight in model.sparsity.weights.items()}
    for name, parameter in [*trained.items(), *((name, parameters[name]) for name in model.sparsity.whole)]:
        with gathered([parameter]):
            yield name, parameter


def unload(model: nn.Module) -> nn.Module:
    """Restore the base model's weights bit for bit and remove everything that `sparsify` added, in place.

    Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a sparse model, which may be wrapped.

    Returns: the model, without wrappers.

    Raises:
        UserError: the model is not sparse.
    """
    model = unwrap(model)
    with disable_adapter(model):
        for weight in model.sparsity.weights.values():
            with gathered([weight.weight], write=True):
                weight.write()
        # So that the end of the block does not restore the trained values
        model.sparsity.whole.clear()
    return _remove(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes with its original weights, those of fully trained modules included.

        with disable_adapter(model):
            reference = model(**batch).logits

    Under ZeRO stage 3, all ranks must enter and leave it.

    Args:
        model: a sparse model, which may be wrapped.

    Raises:
        UserError: the model is not sparse.
    """
    model = unwrap(model)
    sparsity = sparsity_of(model)
    wait_for_prefetch(model)
    parameters = parameters_by_name(model)
    before = {weight: weight.enabled for weight in sparsity.weights.values()}
    trained = {name: _copy(parameters[name]) for name in sparsity.whole}
    for weight in before:
        weight.enabled = False
    _copy_into(parameters, {name: sparsity.originals[name] for name in sparsity.whole})
    try:
        yield
    finally:
        for weight, enabled in before.items():
            weight.enabled = enabled
        _copy_into(parameters, {name: trained[name] for name in sparsity.whole})


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


@torch.no_grad()
def _copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        with gathered([parameters[name]], write=True):
            parameters[name].copy_(value)


def _remove(model: nn.Module) -> nn.Module:
    for weight in model.sparsity.weights.values():
        layers.detach(weight)
    for hook in model.sparsity.hooks:
        hook.remove()
    del model.sparsity
    for parameter in model.parameters():
        if (parameter.is_floating_point() or parameter.is_complex()) and not parameter.is_inference():
            parameter.requires_grad_(True)
    return model
