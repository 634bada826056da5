"""The adapter directory: the values that were trained and a recipe that regenerates their positions.

adapter_config.json         base model, task, selection rule, what was drawn from which weight
adapter_model.safetensors   one tensor (n,) per selected weight, and the parameters trained whole, by the base
                            model's own parameter names
"""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sparse_zero import selection
from sparse_zero.config import SparseConfig
from sparse_zero.errors import UserError
from sparse_zero.loading import load_model, load_tokenizer
from sparse_zero.model import Sparsity, attach, merge_and_unload, sparsity_of, unwrap
from sparse_zero.package import resolve
from sparse_zero.zero import full_shape, gathered, settle

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT_VERSION = 1

# What a task adds to the base model's own configuration, without which a merged model would not be the trained one.
_MODEL_SETTINGS = ("id2label", "label2id", "problem_type", "pad_token_id")


class SelectedTensor(BaseModel):
    """What was drawn from one weight."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int]
    count: int
    positions: str
    """Checksum of the positions, so that a changed rule can never place values wrongly."""


class AdapterConfig(BaseModel):
    """adapter_config.json"""

    model_config = ConfigDict(extra="forbid")

    adapter_type: str = "sparse-zero"
    format_version: int = FORMAT_VERSION
    base_model_name_or_path: str | None
    revision: str | None
    tokenizer: str | None = None
    task: str | None
    dtype: str
    model_settings: dict[str, Any]
    selection_rule: str
    sparse: SparseConfig
    total_parameters: int
    trainable_parameters: int
    tensors: dict[str, SelectedTensor]
    modules_to_save: list[str]
    """The parameters that were trained whole."""
    library_versions: dict[str, str]


def save_adapter(model: nn.Module, directory: str | Path, is_main_process: bool = True) -> None:
    """Write a sparse model's adapter. Under ZeRO stage 3 every rank must call it; the main process writes.

    Raises UserError where the model is not sparse.
    """
    sparsity = sparsity_of(model)
    parameters = dict(unwrap(model).named_parameters())
    tensors = {}
    sources = {name: weight.delta for name, weight in sparsity.weights.items()}
    sources |= {name: parameters[name] for name in sparsity.whole}
    settle(unwrap(model))
    for name, parameter in sources.items():
        with gathered([parameter]):
            if is_main_process:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if not is_main_process:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    text = _describe_adapter(unwrap(model), sparsity).model_dump_json(indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n")


def _describe_adapter(model: nn.Module, sparsity: Sparsity) -> AdapterConfig:
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    some_weight = next(iter(sparsity.weights.values())).weight
    return AdapterConfig(
        base_model_name_or_path=sparsity.base_model,
        revision=sparsity.revision,
        tokenizer=sparsity.tokenizer,
        task=_task_of(model),
        dtype=str(some_weight.dtype).removeprefix("torch."),
        model_settings={key: settings[key] for key in _MODEL_SETTINGS if settings.get(key) is not None},
        selection_rule=selection.RULE,
        sparse=sparsity.config,
        total_parameters=sparsity.total_parameters,
        trainable_parameters=sparsity.trainable_parameters,
        tensors={
            name: SelectedTensor(
                shape=list(weight.shape),
                count=weight.base.numel(),
                positions=selection.checksum(weight.flat_positions()),
            )
            for name, weight in sparsity.weights.items()
        },
        modules_to_save=sparsity.whole,
        library_versions={"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "deepspeed", "sparse-zero")},
    )


def _task_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "sequence-classification"
    return "causal-lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def read_config(directory: str | Path) -> AdapterConfig:
    """Raises UserError: not an adapter directory, a file that is damaged, or one of a newer version."""
    path = Path(directory) / CONFIG_NAME
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory}: not an adapter directory ({CONFIG_NAME} is not there)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(raw, dict) or raw.get("adapter_type") != "sparse-zero":
        raise UserError(f"{path}: not a sparse-zero adapter")
    newer = raw.get("format_version")
    if isinstance(newer, int) and newer > FORMAT_VERSION:
        raise UserError(f"{path}: format {newer} is newer than {FORMAT_VERSION}, the newest that this version reads")
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put an adapter onto its base model (which becomes sparse), or its values into a model sparsified alike.

    Under ZeRO stage 3 every rank must call it. In place; nothing is touched before everything fits.

    Raises UserError: a damaged file, other names or shapes than the model's, positions that this version draws
    differently.
    """
    directory = Path(directory)
    config = read_config(directory)
    inner = unwrap(model)
    tensors = _read_tensors(directory / WEIGHTS_NAME, config)
    _check_fits(inner, config, tensors, directory)
    if not hasattr(inner, "sparsity"):
        counts = {name: tensor.count for name, tensor in config.tensors.items()}
        attach(inner, config.sparse, counts, config.modules_to_save)
        inner.sparsity.base_model = config.base_model_name_or_path
        inner.sparsity.revision, inner.sparsity.tokenizer = config.revision, config.tokenizer
    parameters = dict(inner.named_parameters())
    settle(inner)
    for name, values in tensors.items():
        weight = inner.sparsity.weights.get(name)
        target = weight.delta if weight else parameters[name]
        with gathered([target], write=True), torch.no_grad():
            target.copy_(values)
    return model


def _read_tensors(path: Path, config: AdapterConfig) -> dict[str, torch.Tensor]:
    expected = {*config.tensors, *config.modules_to_save}
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if names != expected:
                odd = sorted(names ^ expected)[0]
                raise UserError(f"{path}: '{odd}' is in only one of {WEIGHTS_NAME} and {CONFIG_NAME}")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    for name, tensor in config.tensors.items():
        if list(tensors[name].shape) != [tensor.count]:
            raise UserError(
                f"{path}: '{name}' has shape {list(tensors[name].shape)}, {CONFIG_NAME} says {tensor.count}"
            )
    return tensors


def _check_fits(model: nn.Module, config: AdapterConfig, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    parameters = dict(model.named_parameters())
    base = f"{directory}: made for {config.base_model_name_or_path}, does not fit {type(model).__name__}"
    if config.selection_rule != selection.RULE:
        raise UserError(
            f"{directory}: selection rule '{config.selection_rule}' is not known; this is {selection.RULE}"
        )
    for name in (*config.tensors, *config.modules_to_save):
        if name not in parameters:
            raise UserError(f"{base}: it has no parameter '{name}'")
    shapes = {name: tensor.shape for name, tensor in config.tensors.items()}
    shapes |= {name: list(tensors[name].shape) for name in config.modules_to_save}
    for name, saved in shapes.items():
        shape = list(full_shape(parameters[name]))
        if shape != saved:
            raise UserError(f"{base}: '{name}' has shape {shape} there and {saved} in the adapter")
    for name, tensor in config.tensors.items():
        numel = full_shape(parameters[name]).numel()
        drawn = selection.positions(config.sparse.seed, name, numel, tensor.count)
        if selection.checksum(drawn) != tensor.positions:
            raise UserError(f"{directory}: the positions of '{name}' are not those that it was trained with")
    if hasattr(model, "sparsity"):
        counts = {name: weight.base.numel() for name, weight in model.sparsity.weights.items()}
        given = {name: tensor.count for name, tensor in config.tensors.items()}
        seeds_differ = model.sparsity.config.seed != config.sparse.seed
        if counts != given or seeds_differ or set(model.sparsity.whole) != set(config.modules_to_save):
            raise UserError(
                f"{directory}: this model was sparsified differently (seed, density, targets or modules_to_save)"
            )


def merge_adapter(directory: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the base model with an adapter's values in its weights, as a plain Hugging Face model directory.

    Returns: facts for the user. Raises UserError: see `load_adapter`; a base model that cannot be loaded.
    """
    started = time.perf_counter()
    config = read_config(directory)
    if config.task is None or config.base_model_name_or_path is None:
        raise UserError(f"{directory}: made in a program of your own; load it there and call merge_and_unload(model)")
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out}: is a file; the merged model is a directory")
    if Path(out).resolve() == Path(resolve(config.base_model_name_or_path)).resolve():
        raise UserError(f"{out}: is the base model, which merging there would overwrite; name another directory")
    model = load_model(
        config.base_model_name_or_path,
        config.task,
        revision=config.revision,
        dtype=getattr(torch, config.dtype),
        settings=config.model_settings,
    )
    tokenizer = load_tokenizer(
        config.tokenizer or config.base_model_name_or_path, None if config.tokenizer else config.revision
    )
    merge_and_unload(load_adapter(model, directory))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "out": str(out),
        "base_model": config.base_model_name_or_path,
        "task": config.task,
        "class": type(model).__name__,
        "merged_parameters": config.trainable_parameters,
        "seconds": time.perf_counter() - started,
    }


def describe(directory: str | Path) -> dict[str, Any]:
    """What `sparse-zero inspect` shows, read without the base model."""
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME, config)
    return {
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
        "task": config.task,
        "dtype": config.dtype,
        "selection_rule": config.selection_rule,
        "seed": config.sparse.seed,
        "density": config.trainable_parameters / config.total_parameters,
        "trainable_parameters": config.trainable_parameters,
        "total_parameters": config.total_parameters,
        "bytes": adapter_bytes(directory),
        "library_versions": config.library_versions,
        "tensors": [
            {
                "name": name,
                "shape": config.tensors[name].shape if name in config.tensors else list(values.shape),
                "trained": "selected" if name in config.tensors else "whole",
                "scalars": values.numel(),
                "norm": values.float().norm().item(),
            }
            for name, values in tensors.items()
        ],
    }


def adapter_bytes(directory: str | Path) -> int:
    """Bytes of an adapter's two files."""
    return sum((Path(directory) / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))
