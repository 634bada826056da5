"""The files of an adapter directory. They are read, checked and written without a model.

adapter_config.json             the base model and its fingerprint, the task, the selection of each weight, checksums
adapter_model.safetensors       by the base model's parameter names: deltas (n,) of the selected scalars, fully trained
                                parameters, and as NAME.rows the fully trained rows of a matrix (rows, columns)
adapter_positions.safetensors   only for positions that cannot be drawn again: int32 or int64 (n,) by parameter name
README.md                       the model card
"""

import dataclasses
import json
import math
import mmap
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_zero.errors import UserError
from sparse_zero.selection import rules
from sparse_zero.selection.columns import COLUMNS, Columns
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import STORED, STRATIFIED, Selection

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
POSITIONS_NAME = "adapter_positions.safetensors"
CARD_NAME = "README.md"
FORMAT_VERSION = 1
ROWS_SUFFIX = ".rows"
MODEL_SETTINGS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Entries that a task sets in the base model's config, and that a merged model needs."""


class SelectedTensor(BaseModel):
    """The selection of one weight."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int]
    count: int = Field(gt=0)
    rule: Literal["stratified-v1", "bernoulli-v1", "columns-v1", "stored"] = STRATIFIED
    seed: int = 0
    probability: float | None = None
    granularity: int = 1
    whole_rows: list[int] = []
    columns: Columns | None = None
    """columns-v1: the columns that the scalars are drawn from."""
    positions: str
    """Checksum of the positions. It detects a change of the rule, which would misplace the deltas."""

    @model_validator(mode="after")
    def _possible_columns(self) -> "SelectedTensor":
        if (self.columns is None) == (self.rule == COLUMNS):
            raise ValueError(f"rule: {self.rule}: columns are given for {COLUMNS}, and for no other rule")
        if self.columns is None:
            return self
        if len(self.shape) < 2 or not 0 < self.columns.count <= self.shape[self.columns.axis]:
            raise ValueError(f"columns: {self.columns.count} are not possible for the shape {self.shape}")
        if self.count > math.prod(self.columns.inner_shape(tuple(self.shape))):
            raise ValueError(f"columns: {self.columns.count} have fewer scalars than the count of {self.count}")
        return self

    @classmethod
    def from_selection(cls, selection: Selection, positions: torch.Tensor) -> "SelectedTensor":
        """Describe a selection whose positions are `positions`, int64 (count,)."""
        fields = dataclasses.asdict(selection)
        del fields["name"]
        fields |= {"shape": list(selection.shape), "whole_rows": list(selection.whole_rows)}
        return cls(**fields, positions=rules.checksum(positions))

    def selection(self, name: str) -> Selection:
        """The selection for the parameter `name`."""
        fields = self.model_dump(exclude={"positions"})
        fields |= {"shape": tuple(self.shape), "whole_rows": tuple(self.whole_rows), "columns": self.columns}
        return Selection(name=name, **fields)


def described(tensors: Mapping[str, Any]) -> dict[str, SelectedTensor]:
    """The selections of `AdapterConfig.tensors` as JSON has them: fields that an older version lacks have defaults."""
    return {name: SelectedTensor.model_validate(entry) for name, entry in tensors.items()}


class AdapterConfig(BaseModel):
    """The contents of adapter_config.json."""

    model_config = ConfigDict(extra="forbid")

    adapter_type: str = "sparse-zero"
    format_version: int = FORMAT_VERSION
    base_model_name_or_path: str | None
    revision: str | None
    base_fingerprint: dict[str, str] = {}
    """A hash of each parameter of the base model, by name. See `model.fingerprint`."""
    tokenizer: str | None = None
    """The source of the tokenizer if it is not the base model."""
    new_tokens: list[str] = []
    """Tokens that were added to the tokenizer."""
    task: str | None
    dtype: str
    """The dtype of the base model in training. If only that or the dtype before `sparsify` is float16: the latter."""
    model_settings: dict[str, Any] = {}
    """Entries of the model's config that the task sets (id2label, pad_token_id)."""
    sparse: SparseConfig
    total_parameters: int
    """Number of scalars of the base model."""
    trainable_parameters: int
    """Number of trained scalars."""
    tensors: dict[str, SelectedTensor]
    """The selection of each weight, by parameter name."""
    modules_to_save: list[str]
    """Names of the fully trained parameters."""
    results: dict[str, Any] = {}
    """Metrics of the run, for the model card."""
    files: dict[str, str] = {}
    """Checksum (xxh3, 128 bits) of each safetensors file."""
    library_versions: dict[str, str] = {}


@dataclasses.dataclass
class Adapter:
    """An adapter in memory. All tensors are by the base model's parameter names."""

    config: AdapterConfig
    deltas: dict[str, torch.Tensor]
    """(n,): the deltas in the order of the positions, without fully trained rows."""
    whole: dict[str, torch.Tensor]
    """The values of fully trained parameters."""
    rows: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """(rows, columns): the values, not deltas, of fully trained rows: rows of new tokens have no original values."""
    stored_positions: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """int64 (n,): positions that cannot be drawn again, fully trained rows included."""

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Adapter({config.trainable_parameters:,} of {config.total_parameters:,} scalars in "
            f"{len(config.tensors)} weights of {config.base_model_name_or_path})"
        )

    def clone(self) -> "Adapter":
        """A copy in memory. The values that `read_adapter` returns are mapped from the file, which may be deleted."""
        parts = {
            part: {name: tensor.clone() for name, tensor in getattr(self, part).items()}
            for part in ("deltas", "whole", "rows", "stored_positions")
        }
        return dataclasses.replace(self, **parts)

    def positions(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The positions of a selected weight, fully trained rows included: int64 (count,)."""
        stored = self.stored_positions.get(name)
        return self.selection(name).positions(device) if stored is None else stored.to(device)

    def selection(self, name: str) -> Selection:
        """The selection of a weight."""
        return self.config.tensors[name].selection(name)


def row_mask(selection: Selection, positions: torch.Tensor) -> torch.Tensor:
    """Whether each position belongs to a fully trained row: bool (count,)."""
    rows = torch.tensor(selection.whole_rows, device=positions.device)
    return torch.isin(torch.div(positions, selection.shape[-1], rounding_mode="trunc"), rows)


def library_versions() -> dict[str, str]:
    """The installed versions of Python and of the libraries that matter for results."""
    names = ("torch", "transformers", "deepspeed", "sparse-zero")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def write_adapter(adapter: Adapter, directory: str | Path, card: str | None = None) -> None:
    """Write an adapter's files.

    The config is written last. If writing is interrupted, the directory has the old adapter, no config, or a config
    whose checksums do not match the files. A mixture is never loaded.

    Args:
        adapter: the adapter.
        directory: created if necessary; files of another adapter in it are replaced.
        card: the text of README.md; None for no change.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = Path(directory)
    tensors = adapter.deltas | adapter.whole | {name + ROWS_SUFFIX: values for name, values in adapter.rows.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = {WEIGHTS_NAME: _write_tensors(directory / WEIGHTS_NAME, tensors)}
        if adapter.stored_positions:
            files[POSITIONS_NAME] = _write_tensors(directory / POSITIONS_NAME, _narrow_positions(adapter))
        else:
            (directory / POSITIONS_NAME).unlink(missing_ok=True)
        if card is not None:
            _replace(directory / CARD_NAME, card)
        config = adapter.config.model_copy(update={"files": files})
        _replace(directory / CONFIG_NAME, config.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: the adapter cannot be written ({error})") from None


def _narrow_positions(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The stored positions as int32 where that is possible."""
    fits = {name: adapter.selection(name).numel < 2**31 for name in adapter.stored_positions}
    positions = adapter.stored_positions.items()
    return {name: flat.to(torch.int32 if fits[name] else torch.int64) for name, flat in positions}


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns: the file's checksum."""
    # Not written in place: the old file stays complete until the end, and a model may have it mapped
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
    return _checksum_of_file(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _checksum_of_file(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128(content).hexdigest()


def read_config(directory: str | Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        UserError: the directory is not an adapter, or the file is damaged or has a newer format.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory}: not an adapter directory (it has no {CONFIG_NAME})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(raw, dict) or raw.get("adapter_type") != "sparse-zero":
        raise UserError(f"{path}: not a sparse-zero adapter; `sparse-zero convert` converts some other formats")
    newer = raw.get("format_version")
    if isinstance(newer, int) and newer > FORMAT_VERSION:
        raise UserError(
            f"{path}: format {newer} is newer than {FORMAT_VERSION}, which this version supports; update sparse-zero"
        )
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter's files.

    Positions that can be drawn again are not drawn or checked here; see `checked_positions`.

    Returns: the adapter. Its values are mapped from the file, not copied into memory.

    Raises:
        UserError: see `read_config`; also a file that is missing, truncated, modified, or inconsistent with the
            config.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME, config)
    selected = {name: entry.selection(name) for name, entry in config.tensors.items()}
    counts = {name: selection.count - selection.whole_row_scalars for name, selection in selected.items()}
    shapes = {name: [count] for name, count in counts.items() if count}
    shapes |= {
        f"{n}{ROWS_SUFFIX}": [len(selection.whole_rows), selection.shape[-1]]
        for n, selection in selected.items()
        if selection.whole_rows
    }
    _check_names(directory / WEIGHTS_NAME, tensors, {*shapes, *config.modules_to_save})
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise UserError(
                f"{directory / WEIGHTS_NAME}: '{name}' has the shape {list(tensors[name].shape)} instead of {shape}, "
                f"which {CONFIG_NAME} requires"
            )
    with_positions = {name for name, selection in selected.items() if selection.rule == STORED}
    positions = _read_tensors(directory / POSITIONS_NAME, config) if with_positions else {}
    _check_names(directory / POSITIONS_NAME, positions, with_positions)
    adapter = Adapter(
        config=config,
        deltas={name: tensors[name] for name, count in counts.items() if count},
        whole={name: tensors[name] for name in config.modules_to_save},
        rows={name: tensors[name + ROWS_SUFFIX] for name, selection in selected.items() if selection.whole_rows},
        stored_positions={name: flat.to(torch.int64) for name, flat in positions.items()},
    )
    for name in with_positions:
        _check_positions(adapter, name, directory)
    return adapter


def checked_positions(adapter: Adapter, name: str, directory: str | Path) -> torch.Tensor:
    """The positions of a selected weight, int64 (count,). Raises UserError if their checksum is wrong."""
    flat = adapter.positions(name)
    _check_checksum(rules.checksum(flat), adapter, name, directory)
    return flat


def checked_position_chunks(
    adapter: Adapter, name: str, directory: str | Path, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """`checked_positions` in chunks. If the checksum is wrong, UserError is raised after the last chunk."""
    digest, stored = rules.Checksum(), adapter.stored_positions.get(name)
    chunks = adapter.selection(name).chunks(device) if stored is None else rules.in_chunks(stored.to(device))
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    _check_checksum(digest.hexdigest(), adapter, name, directory)


def _check_checksum(checksum: str, adapter: Adapter, name: str, directory: str | Path) -> None:
    if checksum != adapter.config.tensors[name].positions:
        raise UserError(f"{directory}: the positions of '{name}' differ from those it was trained with")


def _check_positions(adapter: Adapter, name: str, directory: Path) -> None:
    flat, selection = checked_positions(adapter, name, directory), adapter.selection(name)
    if flat.numel() != selection.count or bool((flat.diff() <= 0).any()) or flat[0] < 0 or flat[-1] >= selection.numel:
        raise UserError(
            f"{directory / POSITIONS_NAME}: damaged: the positions of '{name}' are not valid for its shape "
            f"{list(selection.shape)}"
        )


def _check_names(path: Path, tensors: Mapping[str, torch.Tensor], expected: set[str]) -> None:
    if odd := sorted(tensors.keys() ^ expected):
        raise UserError(f"{path}: '{odd[0]}' is in only one of {path.name} and {CONFIG_NAME}")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file. Raises UserError if the file is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def _read_tensors(path: Path, config: AdapterConfig) -> dict[str, torch.Tensor]:
    tensors = read_safetensors(path)
    if _checksum_of_file(path) != config.files.get(path.name):
        raise UserError(
            f"{path}: damaged, or from a different save than {CONFIG_NAME}, which has another checksum for it"
        )
    return tensors


_ANY_FORMAT = ("adapter_*.json", "adapter_*.safetensors", "sparse_deltas.*", "*_init.*", "config.json")


def adapter_bytes(directory: str | Path) -> int:
    """Size of an adapter's files of any format in bytes, without model card and tokenizer."""
    return sum(path.stat().st_size for pattern in _ANY_FORMAT for path in Path(directory).glob(pattern))
