"""The architecture of a base model: the names, shapes and modules of its parameters, without their values."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_zero.adapters.files import Adapter
from sparse_zero.data.models import AUTO_CLASS, load_config, task_of
from sparse_zero.errors import UserError, did_you_mean, first_line
from sparse_zero.selection.targets import Target, all_targets

MAX_PARAMETERS = 20_000
"""Parameters of the largest model that is built where no file says how many there are: a config.json can claim any
number of layers."""


@dataclass
class Architecture:
    """A base model on the meta device, i.e. without values."""

    model: nn.Module
    config: PreTrainedConfig
    source: str
    """Where the config came from."""

    @cached_property
    def targets(self) -> dict[str, Target]:
        """All parameters by name. A tied parameter has one of its names."""
        return all_targets(self.model)

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """All names of each parameter, several for a tied one."""
        first = {id(target.parameter): name for name, target in self.targets.items()}
        names: dict[str, list[str]] = {name: [] for name in self.targets}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[first[id(parameter)]].append(name)
        return names

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def task(self) -> str | None:
        return task_of(self.class_name)

    @property
    def dtype(self) -> str | None:
        dtype = getattr(self.config, "dtype", None)
        return None if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def labels(self) -> dict[str, Any]:
        if self.task != "sequence-classification":
            return {}
        return {"id2label": self.config.id2label, "label2id": self.config.label2id}

    @property
    def total(self) -> int:
        """Number of scalars."""
        return sum(target.shape.numel() for target in self.targets.values())

    @property
    def prefix(self) -> str:
        """The prefix of the names of all parameters except the head's."""
        return f"{self.model.base_model_prefix}."

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.targets[name].shape) if name in self.targets else None

    def modules(self, parameters: Iterable[str]) -> list[str]:
        """The smallest set of modules that contain exactly these parameters, as far as possible.

        A parameter whose module also has other parameters is represented by that module.
        """
        wanted, modules = set(parameters), dict(self.model.named_modules())
        found: dict[str, None] = {}
        for parameter in parameters:
            parts = parameter.split(".")[:-1]
            ancestors = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]
            full = [
                ancestor
                for ancestor in ancestors
                if all(f"{ancestor}.{name}" in wanted for name, _ in modules[ancestor].named_parameters())
            ]
            found.update(dict.fromkeys((full or ancestors[-1:])[:1]))
        return list(found)


def architecture_of(
    origin: str | Path,
    base: str | None,
    revision: str | None = None,
    task: str | None = None,
    class_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    config: PreTrainedConfig | None = None,
    known: int = 0,
    trust_remote_code: bool = False,
) -> Architecture:
    """Build the base model of an adapter without its values.

    Args:
        origin: the adapter, for errors.
        base: the base model's directory or hub id.
        revision: of the hub's repository.
        task: the adapter's task, if known.
        class_name: the model's class in transformers, if known and the task is not.
        settings: entries of the model's config to set.
        config: the model's config if the adapter has a copy; the base model is then not accessed.
        known: number of parameters that files name. A model with many more is not built.
        trust_remote_code: see `load_model`.

    Raises:
        UserError: the base model is unknown or not found, or its class is unknown.
    """
    source = str(origin) if config is not None else base
    if config is None:
        if base is None:
            raise UserError(f"{origin}: does not name its base model; pass its directory or hub id with --base")
        try:
            config = configuration(base, revision, trust_remote_code)
        except UserError as error:
            raise UserError(
                f"{origin}: the config of its base model is needed, but {error}; pass a directory that has it with "
                "--base"
            ) from None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    for key, value in (settings or {}).items():
        # An added padding token has no row yet, and the embedding would refuse its index
        if key != "pad_token_id" or rows is None or value < rows:
            setattr(config, key, value)
    with _at_most(4 * known + 1000 if known else MAX_PARAMETERS, origin):
        model = _model(origin, config, task, class_name, trust_remote_code)
    return Architecture(model, config, str(source))


def architecture_for(adapter: Adapter, trust_remote_code: bool = False) -> Architecture:
    """The architecture of an adapter's base model. Raises UserError if it is not found or does not fit."""
    config = adapter.config
    base = config.base_model_name_or_path
    found = architecture_of(
        base or "the adapter",
        base,
        config.revision,
        config.task,
        settings=config.model_settings,
        known=len(config.base_fingerprint.keys() | config.tensors.keys() | {*config.modules_to_save}),
        trust_remote_code=trust_remote_code,
    )
    shapes = {name: list(values.shape) for name, values in adapter.whole.items()}
    shapes |= {name: tensor.shape for name, tensor in config.tensors.items()}
    for name, shape in shapes.items():
        expected = found.shape(name)
        if expected is None:
            near = did_you_mean(name, found.targets)
            raise UserError(
                f"'{name}' is not a parameter of {found.class_name}, {base}{near}; pass the right base model with "
                "--base"
            )
        # With new tokens, embeddings have more rows than in the base model
        grown = shape[1:] == list(expected[1:]) and shape[:1] > list(expected[:1])
        grown = grown and (name in adapter.rows or bool(config.new_tokens))
        if shape != list(expected) and not grown:
            raise UserError(
                f"'{name}' has shape {shape} in the adapter and {list(expected)} in {base}; pass the right base model "
                "with --base"
            )
    return found


def configuration(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model. Raises UserError if it cannot be loaded."""
    try:
        return load_config(str(name), revision, trust_remote_code)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.name: ")) from None


class _TooManyParameters(Exception):
    """More parameters than the files can have."""


@contextlib.contextmanager
def _at_most(limit: int, origin: str | Path) -> Iterator[None]:
    """Raise UserError as soon as modules with more than `limit` parameters have been built in this block."""
    count = 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise _TooManyParameters

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    except _TooManyParameters:
        raise UserError(
            f"{origin}: the config of its base model claims more than {limit:,} parameters, which no file has; it is "
            "damaged"
        ) from None
    finally:
        handle.remove()


def _model(
    origin: str | Path, config: PreTrainedConfig, task: str | None, class_name: str | None, trust_remote_code: bool
) -> nn.Module:
    names = [name for name in (class_name, *(config.architectures or ())) if isinstance(name, str) and name]
    # The adapter's class may not fit a different base model that the user names
    fitting = [kind for kind in map(_model_class, names) if kind is not None and type(config) is kind.config_class]
    try:
        with torch.device("meta"):
            if task in AUTO_CLASS:
                return AUTO_CLASS[task].from_config(config, trust_remote_code=trust_remote_code)
            if fitting:
                return fitting[0](config)
    except _TooManyParameters:
        raise
    except Exception as error:  # the values of a damaged config may cause any error
        head = f" for {task}" if task in AUTO_CLASS else ""
        raise UserError(f"{origin}: its base model cannot be built{head} ({first_line(error)})") from None
    shown = f" ({', '.join(dict.fromkeys(names))})" if names else ""
    raise UserError(f"{origin}: the class of its base model{shown} is unknown to transformers")


def _model_class(name: str) -> type[PreTrainedModel] | None:
    """A class of transformers by a name from a file, which may be the name of anything."""
    try:
        found = getattr(transformers, name)
    except Exception:  # importing it may need a library that is not installed
        return None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
