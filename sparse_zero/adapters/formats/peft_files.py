"""The files that all of PEFT's adapters have: adapter_config.json and adapter_model.safetensors.

For a parameter `a.b.weight` of an adapted layer, the tensors are called `base_model.model.a.b.<METHOD>_<PART>`. A
fully trained parameter (`modules_to_save`) is called `base_model.model.a.b.weight`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_zero.adapters.files import CONFIG_NAME, WEIGHTS_NAME, Adapter
from sparse_zero.adapters.formats.architecture import Architecture, architecture_for
from sparse_zero.adapters.formats.files import write_json, write_safetensors
from sparse_zero.adapters.formats.model_weights import ModelWeights
from sparse_zero.adapters.reading import optional, read_json, read_safetensors
from sparse_zero.data.gguf import model_path
from sparse_zero.data.models import task_of
from sparse_zero.errors import UserError

PREFIX = "base_model.model."
HEADS = ["classifier", "score"]
"""The modules that PEFT adds to `modules_to_save` of a sequence classifier."""
_TASKS = {"SEQ_CLS": "sequence-classification", "CAUSAL_LM": "causal-lm"}


def is_peft(directory: Path, *types: str) -> bool:
    """Whether a directory is a PEFT adapter of one of these types, or of any type if none is given."""
    path = directory / CONFIG_NAME
    content = read_json(path) if path.is_file() else {}
    found = None if "adapter_type" in content else content.get("peft_type")  # the former is in our own adapters
    return isinstance(found, str) and (not types or found in types)


def read_parts(
    directory: Path, parts: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Read the files of an adapter.

    Args:
        directory: the adapter.
        parts: the last components of the names of a layer's tensors, and their names in the result.

    Returns: the config; the parts of each adapted weight, by parameter name; the fully trained parameters.

    Raises:
        UserError: a file is damaged, or has other names than PEFT's.
    """
    config, path = read_json(directory / CONFIG_NAME), directory / WEIGHTS_NAME
    if not path.exists() and path.with_suffix(".bin").exists():
        raise UserError(
            f"{path.with_suffix('.bin')}: pickle files are not read; save the adapter with safe_serialization=True"
        )
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for key, tensor in read_safetensors(path).items():
        if not key.startswith(PREFIX):
            raise UserError(f"{path}: '{key}' is not a name that PEFT writes ({PREFIX}...)")
        name = key.removeprefix(PREFIX)
        module, _, ending = name.rpartition(".")
        if ending in parts:
            layers.setdefault(f"{module}.weight", {})[parts[ending]] = tensor
        else:
            whole[name] = tensor
    return config, layers, whole


def required(directory: Path, name: str, parts: Mapping[str, torch.Tensor], *kinds: str) -> list[torch.Tensor]:
    """Some parts of one weight. Raises UserError if one is missing."""
    if missing := [kind for kind in kinds if kind not in parts]:
        raise UserError(f"{directory / WEIGHTS_NAME}: damaged: the {missing[0]} of '{name}' are missing")
    return [parts[kind] for kind in kinds]


def facts(config: Mapping[str, Any], base: str | None, directory: Path) -> dict[str, Any]:
    """The fields of `Contents` that are in PEFT's config. Raises UserError if one has another type."""
    path = directory / CONFIG_NAME
    mapping = optional(config, "auto_mapping", dict, path) or {}
    class_name = optional(mapping, "base_model_class", str, path)
    peft_version = optional(config, "peft_version", str, path)
    named, revision = (optional(config, key, str, path) for key in ("base_model_name_or_path", "revision"))
    return {
        "base": base or named or None,
        "revision": None if base else revision,
        "task": _TASKS.get(optional(config, "task_type", str, path)) or task_of(class_name),
        "class_name": class_name,
        "versions": {"peft": peft_version} if peft_version else {},
    }


def linear_targets(adapter: Adapter, title: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The weights of an adapter, for a PEFT method that only adapts nn.Linear.

    Yields: parameter name, positions int64 (n,), deltas (n,).

    Raises:
        UserError: the adapter has a weight that is not one of a linear layer, fully trained rows, a tied weight, or a
            selected weight in a fully trained module.
    """
    architecture = architecture_for(adapter)
    elsewhere = "use `--to sparta` or `sparse-zero merge`"
    if adapter.rows:
        name = next(iter(adapter.rows))
        raise UserError(f"'{name}' has fully trained rows, which {title} does not support; {elsewhere}")
    if not adapter.deltas:
        raise UserError(f"no weight has selected scalars, but {title} needs at least one; {elsewhere}")
    modules = architecture.modules(adapter.whole)
    for name, values in adapter.deltas.items():
        target = architecture.targets[name]
        kinds = " and ".join(type(module).__name__ for module, _ in target.owners)
        linear = all(isinstance(module, nn.Linear) and held == "weight" for module, held in target.owners)
        # PEFT adapts modules, and would untie those that share a weight
        if not linear or len(target.owners) > 1:
            raise UserError(
                f"'{name}' ({kinds}) is not the weight of one linear layer, which {title} requires; {elsewhere}"
            )
        if any(name.startswith(f"{module}.") for module in modules):
            raise UserError(f"'{name}' is in a fully trained module, where {title} does not adapt it; {elsewhere}")
        yield name, adapter.positions(name), values
    for name in adapter.whole:
        if len(architecture.targets[name].owners) > 1:
            raise UserError(f"'{name}' is tied and fully trained: PEFT would untie it; {elsewhere}")


def write(adapter: Adapter, directory: Path, tensors: Mapping[str, torch.Tensor], method: dict[str, Any]) -> None:
    """Write an adapter as PEFT does.

    Args:
        adapter: the adapter.
        directory: the directory to write.
        tensors: the tensors of the selected weights by name, without PEFT's prefix.
        method: the fields of the config that the method adds.
    """
    config, architecture = adapter.config, architecture_for(adapter)
    modules = architecture.modules(adapter.whole)
    wrapped = _wrapped(modules, architecture)
    task = {task: peft_task for peft_task, task in _TASKS.items()}.get(config.task)
    if task == "SEQ_CLS" and wrapped != _wrapped([*modules, *HEADS], architecture):
        # With a task PEFT would require the values of a head, which was not trained here
        task = None
    kind = type(architecture.model)
    common = {
        "auto_mapping": None if task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": model_path(config.base_model_name_or_path, config.revision),
        "inference_mode": True,
        "modules_to_save": modules or None,
        "revision": config.revision,
        "target_modules": [name.removesuffix(".weight") for name in adapter.deltas],
        "task_type": task,
    }
    tensors = {**tensors, **adapter.whole, **_rest_of(wrapped, adapter, architecture)}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS_NAME, {PREFIX + name: tensor for name, tensor in tensors.items()})
    write_json(directory / CONFIG_NAME, common | method)


def _wrapped(names: list[str], architecture: Architecture) -> set[str]:
    """The modules that PEFT would find for these names in `modules_to_save`: it compares endings."""
    return {name for name, _ in architecture.model.named_modules() if name.endswith(tuple(names))}


def _rest_of(modules: set[str], adapter: Adapter, architecture: Architecture) -> dict[str, torch.Tensor]:
    """The other parameters and buffers of these modules, from the base model: PEFT only saves whole modules."""
    needed = [f"{name}.{key}" for name in modules for key in architecture.model.get_submodule(name).state_dict()]
    missing = [name for name in needed if name not in adapter.whole]
    if not missing:
        return {}
    config = adapter.config
    base = ModelWeights.open(config.base_model_name_or_path, config.revision, architecture).require(missing)
    return {name: base.tensor(name) for name in missing}
