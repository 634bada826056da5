"""Save the adapter of a sparse model, load an adapter on its base model, and write a merged model."""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_zero.adapters.files import (
    Adapter,
    check_finite,
    checked_position_chunks,
    checked_positions,
    library_versions,
    read_adapter,
    row_mask,
    write_adapter,
)
from sparse_zero.adapters.fit import check_base, check_shapes, check_sparsified_alike
from sparse_zero.adapters.hub import adapter_directory, push
from sparse_zero.adapters.model_card import model_card
from sparse_zero.adapters.schema import PEFT_TASKS, AdapterConfig, SelectedTensor, names_by_kind, writable
from sparse_zero.data.models import task_of
from sparse_zero.data.quantization import quantization_of
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import base_dtype, fingerprint
from sparse_zero.model.finite import count_not_finite, describe
from sparse_zero.model.sparse_model import refresh
from sparse_zero.model.sparsify import apply_selection, disable_adapter
from sparse_zero.model.sparsity import Sparsity, sparsity_of, state_of
from sparse_zero.model.wrappers import unwrap, unwrap_for
from sparse_zero.selection.rules import STORED, Selection
from sparse_zero.selection.unsupported import check_model, check_supported
from sparse_zero.zero.parameters import gathered, is_partitioned, wait_for_prefetch

logger = logging.getLogger(__name__)
_SCALARS = (str, bool, int, float, type(None))


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    is_main_process: bool = True,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: str | None = None,
    **push_options: Any,
) -> str | None:
    """Write the active adapter of a sparse model to a directory.

        save_adapter(model, "adapter")
        save_adapter(model, "adapter", is_main_process=accelerator.is_main_process)  # on all ranks

    The directory contains adapter_config.json, adapter_model.safetensors, a model card, and
    adapter_positions.safetensors if the positions cannot be drawn again from the config. Values that are NaN or
    infinite are saved with a warning.

    Args:
        model: a sparse model, which may be wrapped by DDP, Accelerate or DeepSpeed.
        directory: created if necessary; files of another adapter in it are replaced.
        is_main_process: whether this rank writes. Under ZeRO stage 3, all ranks must call the function.
        state_dict: the complete state dict of the model, as `accelerator.get_state_dict` returns it. Under ZeRO stage
            3 one rank alone can then write.
        push_to_hub: a repository of the hub, `user/name`, to upload the directory to; created if necessary.
        **push_options: private, token, revision, tags, create_pr, commit_message, commit_description, as of
            huggingface_hub.

    Returns: the address of the commit on the hub, if there is one.

    Raises:
        UserError: the model is not sparse, the directory or the repository cannot be written, or values are missing
            in the state dict.
    """
    if push_options and push_to_hub is None:
        raise UserError(
            f"save_adapter: {', '.join(push_options)}: options of a push; name the repository, push_to_hub="
        )
    adapter = extract_adapter(model, is_main_process, state_dict)
    if is_main_process:
        parts = (adapter.deltas, adapter.rows, adapter.whole)
        if counts := count_not_finite(item for part in parts for item in part.items()):
            logger.warning("%s: saved values that are NaN or infinite: %s", directory, describe(counts))
        write_adapter(adapter, directory, model_card(adapter.config))
        if push_to_hub is not None:
            return push(directory, push_to_hub, **push_options)
    return None


def extract_adapter(
    model: nn.Module,
    keep: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    sparsity: Sparsity | None = None,
) -> Adapter:
    """Copy the active adapter of a sparse model to the CPU. Under ZeRO stage 3, all ranks must call it.

    Args:
        model: a sparse model, which may be wrapped.
        keep: whether to return the values on this rank. Otherwise only the config is filled.
        state_dict: see `save_adapter`.
        sparsity: the state of an inactive or merged adapter of the model instead of the active one's.
    """
    sparsity, inner = sparsity or sparsity_of(model), unwrap(model)
    wait_for_prefetch(inner)
    positions = {name: weight.flat_positions() for name, weight in sparsity.weights.items()} if keep else {}
    adapter = Adapter(adapter_config(inner, sparsity, positions), deltas={}, whole={})
    for name, values in _deltas(sparsity, state_dict):
        if not keep:
            continue
        weight = sparsity.weights[name]
        if weight.selection.rule == STORED:
            adapter.stored_positions[name] = positions[name].cpu()
        if weight.selection.whole_rows:
            inside = row_mask(weight.selection, positions[name])
            rows = weight.base[inside].to(torch.promote_types(weight.base.dtype, values.dtype)) + values[inside]
            adapter.rows[name] = rows.to(values.dtype).cpu().view(-1, weight.shape[-1])
            values = values[~inside]
        if values.numel():
            adapter.deltas[name] = values.to("cpu", copy=True)
    for name, values in _trained_values(inner, sparsity, state_dict):
        if keep:
            adapter.whole[name] = values.to("cpu", copy=True)
    return adapter


def _deltas(sparsity: Sparsity, state_dict: Mapping[str, torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in sparsity.weights.items():
        if state_dict is not None and is_partitioned(weight.delta):
            yield name, _value(state_dict, weight.tensor_name(name, "delta")).to(weight.delta.dtype)
        else:
            with gathered([weight.delta]):
                yield name, weight.delta.detach()


def _trained_values(
    inner: nn.Module, sparsity: Sparsity, state_dict: Mapping[str, torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if state_dict is None or sparsity.trained or not any(is_partitioned(p) for p in inner.parameters()):
        yield from sparsity.trained_values(inner)
        return
    for name in sparsity.trained_names:
        yield name, _value(state_dict, name)


def _value(state_dict: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state_dict:
        raise UserError(
            f"the state dict has no '{name}': under ZeRO stage 3 set stage3_gather_16bit_weights_on_model_save in the "
            "DeepSpeed configuration, or call save_adapter on all ranks"
        )
    return state_dict[name]


def adapter_config(model: nn.Module, sparsity: Sparsity, positions: Mapping[str, torch.Tensor]) -> AdapterConfig:
    """The adapter_config.json of a sparse model.

    Args:
        model: the model without wrappers.
        sparsity: its state.
        positions: int64 (count,) of each selected weight, by name. Weights that are missing here are left out.
    """
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    dtype = base_dtype(model, [*sparsity.weights, *sparsity.whole])
    if torch.float16 in (dtype, sparsity.dtype):
        # A fingerprint is of float16 values or not, whatever the model was converted to since
        dtype = sparsity.dtype
    model_settings, odd = writable(settings)
    if odd:
        logger.warning("the adapter does not contain %s of the model's config: not of the usual type", ", ".join(odd))
    tensors = {
        name: SelectedTensor.from_selection(sparsity.weights[name].selection, flat) for name, flat in positions.items()
    }
    task = task_of(type(model).__name__)
    return AdapterConfig(
        base_model_name_or_path=sparsity.base_model,
        revision=sparsity.revision,
        base_fingerprint=base_fingerprint(model, sparsity),
        quantized=names_by_kind(sparsity.quantized),
        tokenizer=sparsity.tokenizer,
        new_tokens=sparsity.new_tokens,
        task=task,
        task_type=PEFT_TASKS.get(task),
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization_of(model),
        model_settings=model_settings,
        sparse=sparsity.config,
        total_parameters=sparsity.total_parameters,
        trainable_parameters=sparsity.trainable_parameters,
        tensors=tensors,
        modules_to_save=sparsity.trained_names,
        results={key: value for key, value in sparsity.results.items() if isinstance(value, _SCALARS)},
        library_versions=library_versions(),
    )


def base_fingerprint(model: nn.Module, sparsity: Sparsity) -> dict[str, str]:
    """The fingerprint of the base model of a sparse one without wrappers. Other weights may have been loaded."""
    if sparsity.base_has_changed:
        with_rows = {name for name, weight in sparsity.weights.items() if weight.selection.whole_rows}
        deltas = {weight.tensor_name(name, "delta") for name, weight in sparsity.weights.items()}
        with disable_adapter(model):
            sparsity.fingerprint = fingerprint(model, {*sparsity.whole, *with_rows, *deltas})
        for weight in sparsity.weights.values():
            weight.base_has_changed = False
    return sparsity.fingerprint


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str | None = None,
    *,
    force: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Load an adapter on a model, in place. Under ZeRO stage 3, all ranks must call it.

        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        load_adapter(model, "adapter")

    - A base model becomes sparse, with the deltas written into its weights.
    - A sparse model with the same selection gets the adapter's values.
    - With the name of another adapter, a sparse model keeps it inactive, in CPU memory, until `set_adapter`.

    Args:
        model: the base model or a sparse model, which may be wrapped.
        directory: an adapter directory, or a hub id.
        adapter_name: the name of the adapter. None for the active adapter of a sparse model, or "default".
        force: load values that are NaN or infinite, too.
        revision: a branch, tag or commit of the hub's repository.

    Returns: the same model.

    Raises:
        UserError: the files are damaged, values are NaN or infinite, or the adapter was trained on a different base
            model or has a different selection than the sparse model. The model is then unchanged.
    """
    inner, directory = unwrap(model), adapter_directory(directory, revision)
    adapter, sparsity = read_adapter(directory), state_of(inner)
    if not force:
        check_finite(adapter, directory, "; load them as they are with force=True")
    if sparsity is not None:
        check_shapes(inner, adapter, directory)
    if sparsity is not None and adapter_name in (None, sparsity.name):
        check_base(inner, adapter, directory, base_fingerprint(inner, sparsity))
        check_sparsified_alike(sparsity, adapter, directory)
        set_values(inner, adapter, sparsity.weights)
    elif sparsity is not None:
        check_base(inner, adapter, directory, base_fingerprint(inner, sparsity))
        for name in adapter.config.tensors:
            checked_positions(adapter, name, directory)
        inner.__dict__.setdefault("inactive_adapters", {})[adapter_name] = adapter.clone()
    else:
        inner = unwrap_for(model, [*adapter.config.tensors, *adapter.config.modules_to_save])
        apply_adapter(inner, adapter, directory, adapter_name or "default")
    return model


def apply_adapter(inner: nn.Module, adapter: Adapter, origin: str | Path, adapter_name: str = "default") -> None:
    """Make a base model sparse with an adapter, in place. Under ZeRO stage 3, all ranks must call it.

    Args:
        inner: the base model without wrappers.
        adapter: the adapter.
        origin: the adapter's directory or name, for errors.
        adapter_name: the name it gets.

    Raises:
        UserError: the adapter does not fit the model, or a parameter cannot be trained. The model is then unchanged.
    """
    config = adapter.config
    check_model(inner)
    wait_for_prefetch(inner)
    check_shapes(inner, adapter, origin)
    check_supported(inner, config.tensors, config.modules_to_save)
    with_rows = {name for name in config.tensors if config.tensors[name].whole_rows}
    base = fingerprint(inner, {*config.modules_to_save, *with_rows})
    check_base(inner, adapter, origin, base)
    selections = [adapter.selection(name) for name in config.tensors]

    def chunks(selection: Selection, device: torch.device) -> Iterator[torch.Tensor]:
        return checked_position_chunks(adapter, selection.name, origin, device)

    # The deltas of fully trained rows depend on the rows' original values, which are known afterwards
    deltas = {name: values for name, values in adapter.deltas.items() if name not in adapter.rows}
    apply_selection(inner, config.sparse, selections, config.modules_to_save, chunks, base, deltas)
    sparsity = sparsity_of(inner)
    sparsity.name = adapter_name
    sparsity.base_model, sparsity.revision = config.base_model_name_or_path, config.revision
    sparsity.tokenizer, sparsity.new_tokens = config.tokenizer, list(config.new_tokens)
    sparsity.results = dict(config.results)
    set_values(inner, adapter, list(adapter.rows))


@torch.no_grad()
def set_values(inner: nn.Module, adapter: Adapter, selected: Collection[str]) -> None:
    """Set the deltas of the weights `selected`, and all fully trained parameters."""
    wait_for_prefetch(inner)
    sparsity = sparsity_of(inner)
    for name in selected:
        weight, values = sparsity.weights[name], adapter.deltas.get(name)
        if name in adapter.rows:
            inside = row_mask(weight.selection, weight.flat_positions())
            device, rows = inside.device, adapter.rows[name].flatten()
            spread = torch.zeros(inside.numel(), dtype=rows.dtype, device=device)
            spread[inside] = (rows.to(device).float() - weight.base[inside].float()).to(rows.dtype)
            if values is not None:
                spread[~inside] = values.to(device)
            values = spread
        with gathered([weight.delta], write=True):
            weight.delta.copy_(values)
    sparsity.set_trained_values(inner, adapter.whole)
    refresh(inner)
