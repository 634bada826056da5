"""Adapters and models: what a sparse model saves, and an adapter that is put onto its base model."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sparse_zero.adapters.files import (
    Adapter,
    AdapterConfig,
    SelectedTensor,
    checked_chunks,
    checked_positions,
    library_versions,
    read_adapter,
    read_config,
    row_mask,
    write_adapter,
)
from sparse_zero.adapters.model_card import model_card
from sparse_zero.data.models import add_tokens, load_model, load_tokenizer, make_room
from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differences, fingerprint
from sparse_zero.model.sparsify import Sparsity, attach, merge_and_unload, set_scale, sparsity_of, unwrap
from sparse_zero.selection.rules import STORED, Draw
from sparse_zero.zero.parameters import full_shape, gathered, settle

logger = logging.getLogger(__name__)

# What a task adds to the base model's own configuration, without which a merged model would not be the trained one.
_MODEL_SETTINGS = ("id2label", "label2id", "problem_type", "pad_token_id")


def save_adapter(model: nn.Module, directory: str | Path, is_main_process: bool = True) -> None:
    """Write a sparse model's adapter. Under ZeRO stage 3 every rank must call it; the main process writes.

    Raises UserError: the model is not sparse; the directory cannot be written.
    """
    adapter = collect(model, keep=is_main_process)
    if is_main_process:
        write_adapter(adapter, directory, model_card(adapter.config))


def collect(model: nn.Module, keep: bool = True) -> Adapter:
    """A sparse model's active adapter, on the CPU. Collective under ZeRO stage 3.

    Args: keep: whether this rank wants the values; without it only the config is filled.
    """
    sparsity, inner = sparsity_of(model), unwrap(model)
    parameters = dict(inner.named_parameters())
    settle(inner)
    positions = {name: weight.flat_positions() for name, weight in sparsity.weights.items()} if keep else {}
    adapter = Adapter(describe_config(inner, sparsity, positions), deltas={}, whole={})
    for name, weight in sparsity.weights.items():
        with gathered([weight.delta]):
            if not keep:
                continue
            values = weight.delta.detach()
            if weight.draw.rule == STORED:
                adapter.stored[name] = positions[name].cpu()
            if weight.draw.whole_rows:
                inside = row_mask(weight.draw, positions[name])
                rows = weight.base[inside].to(torch.promote_types(weight.base.dtype, values.dtype)) + values[inside]
                adapter.rows[name] = rows.to(values.dtype).cpu().view(-1, weight.shape[-1])
                values = values[~inside]
            if values.numel():
                adapter.deltas[name] = values.to("cpu", copy=True)
    for name in sparsity.whole:
        with gathered([parameters[name]]):
            if keep:
                adapter.whole[name] = parameters[name].detach().to("cpu", copy=True)
    return adapter


def describe_config(model: nn.Module, sparsity: Sparsity, positions: Mapping[str, torch.Tensor]) -> AdapterConfig:
    """What adapter_config.json says of a sparse model. Args: positions: int64 (count,) of each selected weight."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    some_weight = dict(model.named_parameters())[next(iter([*sparsity.weights, *sparsity.whole]))]
    return AdapterConfig(
        base_model_name_or_path=sparsity.base_model,
        revision=sparsity.revision,
        base_fingerprint=sparsity.fingerprint,
        tokenizer=sparsity.tokenizer,
        new_tokens=sparsity.new_tokens,
        task=_task_of(model),
        dtype=str(some_weight.dtype).removeprefix("torch."),
        model_settings={key: settings[key] for key in _MODEL_SETTINGS if settings.get(key) is not None},
        sparse=sparsity.config,
        total_parameters=sparsity.total_parameters,
        trainable_parameters=sparsity.trainable_parameters,
        tensors={n: SelectedTensor.describe(sparsity.weights[n].draw, flat) for n, flat in positions.items()},
        modules_to_save=sparsity.whole,
        results=sparsity.results,
        library_versions=library_versions(),
    )


def _task_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "sequence-classification"
    return "causal-lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def load_adapter(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> nn.Module:
    """Put an adapter onto its base model (which becomes sparse), or its values into a model sparsified alike.

    Args: adapter_name: of a sparse model, keep the adapter under this name until `set_adapter` asks for it.
    Under ZeRO stage 3 every rank must call it. In place; nothing is touched before everything fits.

    Raises UserError: a damaged file, another base model, positions that this version draws differently.
    """
    inner = unwrap(model)
    adapter = read_adapter(directory)
    if hasattr(inner, "sparsity") and adapter_name in (None, inner.sparsity.name):
        _check_base(inner, adapter, directory, inner.sparsity.fingerprint)
        _check_sparsified_alike(inner.sparsity, adapter, directory)
        _set_values(inner, adapter, inner.sparsity.weights)
    elif hasattr(inner, "sparsity"):
        _check_base(inner, adapter, directory, inner.sparsity.fingerprint)
        for name in adapter.config.tensors:
            checked_positions(adapter, name, directory)
        inner.__dict__.setdefault("parked_adapters", {})[adapter_name] = adapter.copied()
    else:
        put_on(inner, adapter, directory, adapter_name or "default")
    return model


def put_on(inner: nn.Module, adapter: Adapter, origin: str | Path, adapter_name: str = "default") -> None:
    """Make a base model sparse with an adapter. In place. Collective under ZeRO stage 3.

    Args: origin: what the adapter is called in errors.
    Raises UserError where it does not fit, with the model as it was.
    """
    config = adapter.config
    settle(inner)
    _check_shapes(inner, adapter, origin)
    with_rows = {name for name in config.tensors if config.tensors[name].whole_rows}
    base = fingerprint(inner, {*config.modules_to_save, *with_rows})
    _check_base(inner, adapter, origin, base)
    draws = [adapter.draw(name) for name in config.tensors]

    def chunks(draw: Draw, device: torch.device) -> Iterator[torch.Tensor]:
        return checked_chunks(adapter, draw.name, origin, device)

    # What a row trained whole adds is known once its original values are
    deltas = {name: values for name, values in adapter.deltas.items() if name not in adapter.rows}
    attach(inner, config.sparse, draws, list(config.modules_to_save), chunks, base, deltas)
    sparsity = inner.sparsity
    sparsity.name = adapter_name
    sparsity.base_model, sparsity.revision = config.base_model_name_or_path, config.revision
    sparsity.tokenizer, sparsity.new_tokens = config.tokenizer, list(config.new_tokens)
    sparsity.results = dict(config.results)
    _set_values(inner, adapter, list(adapter.rows))


@torch.no_grad()
def _set_values(inner: nn.Module, adapter: Adapter, selected: Collection[str]) -> None:
    """Args: selected: the weights whose deltas are to be set."""
    settle(inner)
    parameters = dict(inner.named_parameters())
    for name in selected:
        weight, values = inner.sparsity.weights[name], adapter.deltas.get(name)
        if name in adapter.rows:
            inside = row_mask(weight.draw, weight.flat_positions())
            device, rows = inside.device, adapter.rows[name].flatten()
            spread = torch.zeros(inside.numel(), dtype=rows.dtype, device=device)
            spread[inside] = (rows.to(device).float() - weight.base[inside].float()).to(rows.dtype)
            if values is not None:
                spread[~inside] = values.to(device)
            values = spread
        with gathered([weight.delta], write=True):
            weight.delta.copy_(values)
    for name, values in adapter.whole.items():
        with gathered([parameters[name]], write=True):
            parameters[name].copy_(values)


def _check_shapes(model: nn.Module, adapter: Adapter, origin: str | Path) -> None:
    config, parameters = adapter.config, dict(model.named_parameters())
    base = f"{origin}: made for {config.base_model_name_or_path}, does not fit {type(model).__name__}"
    shapes = {name: tensor.shape for name, tensor in config.tensors.items()}
    shapes |= {name: list(values.shape) for name, values in adapter.whole.items()}
    for name, saved in shapes.items():
        if name not in parameters:
            raise UserError(f"{base}: it has no parameter '{name}'")
        shape = list(full_shape(parameters[name]))
        if shape != saved:
            grown = config.tensors[name].whole_rows if name in config.tensors else ()
            hint = f"; model.resize_token_embeddings({saved[0]}) makes room for its new tokens" if grown else ""
            raise UserError(f"{base}: '{name}' has shape {shape} there and {saved} in the adapter{hint}")


def _check_base(model: nn.Module, adapter: Adapter, origin: str | Path, base: dict[str, str]) -> None:
    config = adapter.config
    half = {str(p.dtype) == "torch.float16" for p in model.parameters() if p.is_floating_point()}
    if any(half) != (config.dtype == "float16"):
        logger.warning("%s: not checked against the base model's weights: only one of them is in float16", origin)
        return
    if odd := differences(base, config.base_fingerprint):
        at = f" at revision {config.revision}" if config.revision else ""
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(
            f"{origin}: made for {config.base_model_name_or_path}{at}, and this model has other weights: "
            f"'{odd[0]}'{more}; load that base model, in the revision that the adapter was trained on"
        )


def _check_sparsified_alike(sparsity: Sparsity, adapter: Adapter, origin: str | Path) -> None:
    config = adapter.config
    same = sparsity.weights.keys() == config.tensors.keys() and set(sparsity.whole) == set(config.modules_to_save)
    for name, weight in sparsity.weights.items() if same else ():
        here = SelectedTensor.describe(weight.draw, weight.flat_positions())
        same = same and here.positions == config.tensors[name].positions
    if not same:
        raise UserError(
            f"{origin}: this model was sparsified differently (seed, density, targets or modules_to_save); "
            "give an adapter_name to keep it beside the active adapter"
        )


def write_merged(directory: str | Path, out: str | Path, scale: float = 1.0) -> dict[str, Any]:
    """Write the base model with an adapter's values in its weights, as a plain Hugging Face model directory.

    Args: scale: how often the deltas count.
    Returns: facts for the user. Raises UserError: see `load_adapter`; a base model that cannot be loaded.
    """
    started = time.perf_counter()
    config = read_config(directory)
    if config.task is None or config.base_model_name_or_path is None:
        raise UserError(f"{directory}: made in a program of your own; load it there and call merge_and_unload(model)")
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out}: is a file; the merged model is a directory")
    if Path(out).resolve() == Path(package_path(config.base_model_name_or_path)).resolve():
        raise UserError(f"{out}: is the base model, which merging there would overwrite; name another directory")
    model = load_model(
        config.base_model_name_or_path,
        config.task,
        revision=config.revision,
        dtype=getattr(torch, config.dtype),
        settings=config.model_settings,
    )
    tokenizer = _tokenizer_of(config)
    if config.new_tokens:
        add_tokens(tokenizer, config.new_tokens)
        make_room(model, tokenizer)
    load_adapter(model, directory)
    set_scale(model, scale)
    merge_and_unload(model)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return {
        "out": str(out),
        **({} if tokenizer else {"tokenizer": "none, as with the base model"}),
        "base_model": config.base_model_name_or_path,
        "task": config.task,
        "class": type(model).__name__,
        "merged_parameters": config.trainable_parameters,
        "seconds": time.perf_counter() - started,
    }


def _tokenizer_of(config: AdapterConfig) -> PreTrainedTokenizerBase | None:
    """That of the adapter's run, or of its base model; None where a program of the user's own had a base without."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    try:
        return load_tokenizer(config.base_model_name_or_path, config.revision)
    except UserError:
        if config.new_tokens:
            raise
        return None
