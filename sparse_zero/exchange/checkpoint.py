"""The weights of a Hugging Face model directory, one tensor or some rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from sparse_zero.errors import UserError
from sparse_zero.exchange.architecture import Architecture
from sparse_zero.exchange.files import read_json
from sparse_zero.package import resolve

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

    @classmethod
    def open(cls, name: str, revision: str | None, architecture: Architecture) -> "Checkpoint":
        """Args: name: a directory, package://... or hub id. Raises UserError: no safetensors files there."""
        directory = Path(resolve(name))
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
        return cls(directory, architecture)

    @classmethod
    def at_hand(cls, name: str | None, revision: str | None, architecture: Architecture) -> "Checkpoint | None":
        """`open` where that needs no download, else None."""
        if name is None:
            return None
        directory = Path(resolve(name))
        if not directory.is_dir():
            try:
                found = snapshot_download(name, revision=revision, allow_patterns=_FETCHED, local_files_only=True)
            except (LocalEntryNotFoundError, HFValidationError):
                return None
            directory = Path(found)
        return cls(directory, architecture) if has_weights(directory) else None

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
                raise UserError(
                    f"{self.directory}: has no weights for '{name}'; if they are stored under an older name, load the "
                    "model with this version of transformers and save it again"
                )
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
