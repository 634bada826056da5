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
from sparse_zero.model.activation import CONTENTS, attach, deactivate, merge
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.dequantize import check_dequantizable, dequantize
from sparse_zero.model.fingerprint import base_dtype, fingerprint
from sparse_zero.model.first_backward import FirstBackward
from sparse_zero.model.quantized_weight import QuantizedWeight
from sparse_zero.model.setting import BASE
from sparse_zero.model.sparsity import Sparsity, check_not_sparse, read_values, sparsity_of, state_of
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight import SparseWeight
from sparse_zero.model.wrappers import check_wrappers, unwrap
from sparse_zero.quantized.formats import kinds, quantized_layers
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection, in_chunks
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import Target, all_targets, find_modules_to_save, parameter_names
from sparse_zero.selection.threads import map_in_threads
from sparse_zero.selection.unsupported import check_model, check_supported
from sparse_zero.zero.parameters import is_partitioned, wait_for_prefetch

logger = logging.getLogger(__name__)

PositionChunks = Callable[[Selection, torch.device], Iterable[torch.Tensor]]
"""Returns the positions of a selection in chunks: int64, sorted, on the device."""


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

    whole = [*parameter_names(inner, whole_modules), *_buffer_names(inner, whole_modules)]
    apply_selection(inner, config, selections, whole, chunks)
    return model


def _buffer_names(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The names of all buffers in the given modules that a state dict contains."""
    return [
        f"{parent}.{name}" if parent else name
        for module in modules
        for parent, child in model.get_submodule(module).named_modules(prefix=module)
        for name in {*child._buffers.keys()} - {*child._non_persistent_buffers_set}
    ]


@torch.inference_mode(False)  # a delta that is created under it could never be trained
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
        UserError: the model is sparse already, a parameter cannot be trained, or `chunks` raised it. The model is then
            unchanged.
    """
    check_not_sparse(model)
    selections, whole = list(selections), list(whole)
    check_supported(model, [selection.name for selection in selections], whole)
    wait_for_prefetch(model)
    for _, layer in quantized_layers(model):
        layer.convert_bias()
    parameters = all_targets(model)
    if config.indices == "regenerated" and (
        stored := [selection.name for selection in selections if not selection.can_regenerate]
    ):
        logger.warning(
            "sparse.indices: the positions of %s cannot be regenerated: they are stored",
            ", ".join(stored),
        )
    with_new_rows = {selection.name for selection in selections if selection.whole_rows}
    contents = vars(model).get(CONTENTS, {})
    counter = StepCounter()
    weights = {
        selection.name: _kind_of(parameters[selection.name])(
            parameters[selection.name], selection, counter, config, contents
        )
        for selection in selections
    }
    state = Sparsity(
        config=config,
        weights=weights,
        whole=[name for name in whole if name in parameters],
        buffers=[name for name in whole if name not in parameters],
        originals=read_values(model, whole),
        total_parameters=sum(target.shape.numel() for target in parameters.values()),
        selected_parameters=sum(selection.count for selection in selections),
        whole_parameters=sum(parameters[name].shape.numel() for name in whole if name in parameters),
        counter=counter,
        fingerprint=fingerprint(model, {*whole, *with_new_rows}) if base_fingerprint is None else base_fingerprint,
        dtype=base_dtype(model, [*weights, *whole]),
        quantized=kinds(model),
        required_grad={name: target.parameter.requires_grad for name, target in parameters.items()},
        base_model=_name_of(model),
    )
    for weight in weights.values():
        layers.attach(weight)
    try:
        _initialize(weights, chunks, deltas or {})
    except BaseException:
        for weight in weights.values():
            layers.detach(weight)
            contents.pop(weight.selection.name, None)
        raise
    vars(model)[CONTENTS] = contents
    attach(model, state)
    tensors = {name: weight.delta for name, weight in weights.items()}
    counter.watch = FirstBackward(tensors | {name: parameters[name].parameter for name in state.whole})
    state.hooks.append(counter.watch)
    return model


def _name_of(model: nn.Module) -> str | None:
    """The name or path that a model was loaded from, None for a model that transformers did not load."""
    config = getattr(model, "config", None)
    name, file = getattr(config, "name_or_path", None), getattr(config, "quantization_config", None)
    file = getattr(file, "gguf_file", None)
    return f"{name}/{file}" if name and file else name or None


def _kind_of(target: Target) -> type[TrainedDelta]:
    return SparseWeight if target.quantized is None else QuantizedWeight


def _initialize(
    weights: Mapping[str, TrainedDelta], chunks: PositionChunks, deltas: Mapping[str, torch.Tensor]
) -> None:
    """Initialize the weights. Nothing is written into one before the positions of all are checked.

    If it raises an error, all parameters have their original values.
    """

    def take_positions(weight: TrainedDelta) -> None:
        weight.take_positions(chunks(weight.selection, weight.weight.device))

    def initialize(weight: TrainedDelta) -> None:
        weight.initialize(deltas.get(weight.selection.name))
        initialized.append(weight)

    _check_deltas(weights, deltas)
    initialized: list[TrainedDelta] = []
    # ZeRO stage 3 must gather in the same order on all ranks, and an accelerator gains nothing from threads
    sequential = any(is_partitioned(w.weight) or w.weight.device.type != "cpu" for w in weights.values())
    for_each = _for_each if sequential else map_in_threads
    for_each(take_positions, weights.values())
    try:
        for_each(initialize, weights.values())
    except BaseException:  # such as a lack of memory
        for weight in initialized:
            if weight.selection.name in deltas and not is_partitioned(weight.weight):
                weight.write(BASE)
        raise


def _check_deltas(weights: Mapping[str, TrainedDelta], deltas: Mapping[str, torch.Tensor]) -> None:
    for name, values in deltas.items():
        count = weights[name].selection.count
        if values.shape != (count,) or not values.is_floating_point():
            raise UserError(
                f"{name}: the deltas must be real numbers, ({count},), not {values.dtype} {list(values.shape)}"
            )


def _for_each(function: Callable[[TrainedDelta], None], weights: Iterable[TrainedDelta]) -> None:
    for weight in weights:
        function(weight)


def merge_and_unload(model: nn.Module, force: bool = False) -> nn.Module:
    """Write the deltas into the weights and remove everything else that `sparsify` added, in place.

    The result is a plain model, e.g. for `save_pretrained`. It cannot be undone; see `merge_adapter`. Inactive
    adapters are removed: they belong to the base model. Under ZeRO stage 3, all ranks must call it, and the model
    stays partitioned. The layers of a quantised base are replaced by plain ones in the dtype of its other parameters.

    Args:
        model: a sparse model, which may be wrapped.
        force: merge values that are NaN or infinite, too.

    Returns: the model, without wrappers.

    Raises:
        UserError: the model is not sparse, a trained value is NaN or infinite, or stage 3 partitions a quantised base.
            The model is then unchanged.
    """
    model = unwrap(model)
    check_dequantizable(model)
    dequantize(model, merge(model, force).weights)
    return forget_adapters(model)


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
    state = deactivate(model)
    for weight in state.weights.values():
        weight.is_plain = True
    return forget_adapters(model)


def forget_adapters(model: nn.Module) -> nn.Module:
    """Remove what belongs to all adapters of a model."""
    for adapter in vars(model).get("inactive_adapters", {}).values():
        for weight in adapter.weights.values() if isinstance(adapter, Sparsity) else ():
            weight.is_plain = True
    for name in (CONTENTS, "inactive_adapters"):
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
