"""The saved weights of a Hugging Face model, read one tensor or a range of rows at a time."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from sparse_zero.adapters.formats.architecture import Architecture, configuration
from sparse_zero.adapters.formats.base_model import check_size
from sparse_zero.adapters.reading import check_regular, optional, read_json
from sparse_zero.data.gguf import model_path
from sparse_zero.errors import UserError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DOWNLOADED = ["*.json", "*.safetensors"]
CHUNK_BYTES = 64 * 2**20
"""The size of the ranges of rows that `row_chunks` returns."""


def has_weights(directory: Path) -> bool:
    """Whether a directory has weights in safetensors files."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


@dataclass
class ModelWeights:
    """The weights in a model's safetensors files, by the model's parameter names. They are not loaded into memory."""

    directory: Path
    architecture: Architecture
    notes: ClassVar[list[str]] = []
    """Remarks for the user on how the weights are read."""

    @classmethod
    def open(cls, name: str, revision: str | None, architecture: Architecture) -> "ModelWeights":
        """Open the weights of a model; download them if necessary.

        Args:
            name: a directory, package://... or a hub id.
            revision: of the hub's repository.
            architecture: of the model.

        Raises:
            UserError: the model cannot be downloaded, or has no safetensors files.
        """
        directory = Path(model_path(name, revision))
        if not directory.is_dir():
            try:
                directory = Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))
            except (OSError, HfHubHTTPError, HFValidationError) as error:
                raise UserError(
                    f"--base: {name} is not a directory and cannot be downloaded ({first_line(error)})"
                ) from None
        if not has_weights(directory):
            raise UserError(
                f"{directory}: has neither {SINGLE} nor {INDEX}; save the model with transformers (save_pretrained)"
            )
        weights = cls(directory, architecture)
        body = [name for name in architecture.targets if name.startswith(architecture.prefix)]
        # A head may be new. If other weights are missing, they are saved under other names than the model's.
        renamed = any(weights.key(name) is None for name in body)
        return LoadedModelWeights(directory, architecture) if renamed else weights

    @classmethod
    def open_local(cls, name: str | None, revision: str | None, architecture: Architecture) -> "ModelWeights | None":
        """`open` without a download. None if the weights are not available locally."""
        if name is None:
            return None
        directory = Path(model_path(name, revision))
        if not directory.is_dir():
            try:
                found = snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED, local_files_only=True)
            except (LocalEntryNotFoundError, HFValidationError):
                return None
            directory = Path(found)
        weights = cls(directory, architecture)
        complete = has_weights(directory) and all(path.is_file() for path in weights.files.values())
        return weights if complete else None

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The saved parameters, as from a model. They are mapped from the file, so only what is read is loaded."""
        for name in self.architecture.targets:
            if self.key(name) is not None:
                yield name, self.tensor(name)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each saved tensor."""
        return _files(self.directory)

    def key(self, name: str) -> str | None:
        """The name under which a parameter is saved: its own or a tied one, with or without the model's prefix."""
        prefix = self.architecture.prefix
        for alias in self.architecture.aliases.get(name, [name]):
            for key in (alias, alias.removeprefix(prefix), prefix + alias):
                if key in self.files:
                    return key
        return None

    def require(self, names: Iterable[str]) -> "ModelWeights":
        """Raise UserError if one of these parameters is not saved. Returns: self."""
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
        """Rows [start, stop) of the first dimension. For a tensor without dimensions, the tensor."""
        with self._file(name) as file:
            part = file.get_slice(self.key(name))
            return part[start:stop] if part.get_shape() else file.get_tensor(self.key(name))

    def _file(self, name: str) -> contextlib.AbstractContextManager[safe_open]:
        return _opened(self.files[self.key(name)])


class LoadedModelWeights(ModelWeights):
    """Weights that transformers renames, joins or splits in loading (e.g. experts). The whole model is loaded."""

    notes: ClassVar[list[str]] = ["the whole model was loaded, because its weights are saved under other names"]

    @cached_property
    def loaded(self) -> dict[str, torch.Tensor]:
        verbosity = transformers_logging.get_verbosity()
        configuration(self.directory)  # refuses what would run code
        check_size(self.directory, self.architecture)
        # No report on missing weights, which may be normal; `require` reports those that matter
        transformers_logging.set_verbosity_error()
        try:
            model, report = type(self.architecture.model).from_pretrained(
                self.directory, dtype="auto", output_loading_info=True
            )
        except Exception as error:  # damaged files may cause any error
            raise UserError(f"{self.directory}: cannot be loaded ({first_line(error)})") from None
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
    """Ranges (start, stop) of rows, of about CHUNK_BYTES each in float32."""
    per_row = max(1, torch.Size(shape[1:]).numel() * 4)
    step = max(1, CHUNK_BYTES // per_row)
    length = shape[0] if shape else 1
    for start in range(0, length, step):
        yield start, min(start + step, length)


def count_tensors(directory: Path) -> int:
    """The number of saved tensors of a model. Raises UserError if a file is damaged."""
    return len(_files(directory))


def _files(directory: Path) -> dict[str, Path]:
    """The file of each saved tensor."""
    path = directory / INDEX
    if path.is_file():
        weight_map = optional(read_json(path), "weight_map", dict, path) or {}
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{path}: damaged: weight_map names '{file}', which is not a file of {directory}")
        return {name: directory / file for name, file in weight_map.items()}
    with _opened(directory / SINGLE) as file:
        return dict.fromkeys(file.keys(), directory / SINGLE)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # also a KeyError for a dtype that torch does not have
        raise UserError(f"{path}: damaged ({first_line(error)})") from None
