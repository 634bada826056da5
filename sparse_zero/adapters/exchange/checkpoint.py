"""The weights of a Hugging Face model directory, one tensor or some rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from sparse_zero.adapters.exchange.architecture import Architecture
from sparse_zero.adapters.exchange.files import read_json
from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FETCHED = ["*.json", "*.safetensors"]
CHUNK_BYTES = 64 * 2**20
"""Of one tensor, how much is read at once."""


def has_weights(directory: Path) -> bool:
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


@dataclass
class Checkpoint:
    """Safetensors files, which stay on the disk, under the names that the model gives its parameters."""

    directory: Path
    architecture: Architecture
    notes: ClassVar[list[str]] = []
    """What a user must know of how it is read."""

    @classmethod
    def open(cls, name: str, revision: str | None, architecture: Architecture) -> "Checkpoint":
        """Args: name: a directory, package://... or hub id. Raises UserError: no safetensors files there."""
        directory = Path(package_path(name))
        if not directory.is_dir():
            try:
                directory = Path(snapshot_download(name, revision=revision, allow_patterns=_FETCHED))
            except (OSError, HfHubHTTPError, HFValidationError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"--base: {name} is no directory, and cannot be fetched ({reason})") from None
        if not has_weights(directory):
            raise UserError(
                f"{directory}: neither {SINGLE} nor {INDEX} is there; save it with transformers (save_pretrained)"
            )
        checkpoint = cls(directory, architecture)
        body = [name for name in architecture.targets if name.startswith(architecture.prefix)]
        # A head may be new. Where another part is missing, the stored names are not the model's own.
        renamed = any(checkpoint.key(name) is None for name in body)
        return LoadedCheckpoint(directory, architecture) if renamed else checkpoint

    @classmethod
    def at_hand(cls, name: str | None, revision: str | None, architecture: Architecture) -> "Checkpoint | None":
        """`open` where that needs no download, else None."""
        if name is None:
            return None
        directory = Path(package_path(name))
        if not directory.is_dir():
            try:
                found = snapshot_download(name, revision=revision, allow_patterns=_FETCHED, local_files_only=True)
            except (LocalEntryNotFoundError, HFValidationError):
                return None
            directory = Path(found)
        checkpoint = cls(directory, architecture)
        complete = has_weights(directory) and all(path.is_file() for path in checkpoint.files.values())
        return checkpoint if complete else None

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As of a model, those that are stored. They are mapped: only what is read of them costs anything."""
        for name in self.architecture.targets:
            if self.key(name) is not None:
                yield name, self.tensor(name)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each stored tensor."""
        if (self.directory / INDEX).is_file():
            places = read_json(self.directory / INDEX).get("weight_map", {})
            return {name: self.directory / place for name, place in places.items()}
        path = self.directory / SINGLE
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)

    def key(self, name: str) -> str | None:
        """The stored name of a parameter: its own, that of a place it is tied to, or without the head's prefix."""
        prefix = self.architecture.prefix
        for alias in self.architecture.aliases.get(name, [name]):
            for key in (alias, alias.removeprefix(prefix), prefix + alias):
                if key in self.files:
                    return key
        return None

    def require(self, names: Iterable[str]) -> "Checkpoint":
        """Raises UserError: one of these parameters is not stored."""
        for name in names:
            if self.key(name) is None:
                raise UserError(f"{self.directory}: damaged: has no weights for '{name}'")
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        with self._file(name) as file:
            return tuple(file.get_slice(self.key(name)).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        with self._file(name) as file:
            return file.get_tensor(self.key(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """[start, stop) of the first dimension; all of a scalar."""
        with self._file(name) as file:
            part = file.get_slice(self.key(name))
            return part[start:stop] if part.get_shape() else file.get_tensor(self.key(name))

    def _file(self, name: str):
        return _opened(self.files[self.key(name)])


class LoadedCheckpoint(Checkpoint):
    """A model whose stored tensors transformers renames, joins or splits (the experts of mixtures): loaded whole."""

    notes: ClassVar[list[str]] = ["loaded whole: the weights are stored under other names than the model's own"]

    @cached_property
    def loaded(self) -> dict[str, torch.Tensor]:
        verbosity = transformers_logging.get_verbosity()
        # Its report on missing weights alarms people; they are told of those that matter.
        transformers_logging.set_verbosity_error()
        try:
            model, report = type(self.architecture.model).from_pretrained(
                self.directory, dtype="auto", output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.directory}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
        finally:
            transformers_logging.set_verbosity(verbosity)
        return {n: t.detach() for n, t in model.state_dict().items() if n not in report["missing_keys"]}

    def key(self, name: str) -> str | None:
        return next((alias for alias in self.architecture.aliases.get(name, [name]) if alias in self.loaded), None)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.loaded[self.key(name)].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self.loaded[self.key(name)]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensor(name)
        return tensor[start:stop] if tensor.dim() else tensor


def row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension that are small enough to read at once."""
    per_row = max(1, torch.Size(shape[1:]).numel() * 4)
    step = max(1, CHUNK_BYTES // per_row)
    length = shape[0] if shape else 1
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
