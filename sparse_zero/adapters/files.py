"""The adapter directory, as files: no model is needed to read, check, write or describe one.

adapter_config.json             base model and its fingerprint, task, what was drawn from which weight, checksums
adapter_model.safetensors       by the base model's own parameter names: deltas (n,) of the selected scalars, the
                                parameters trained whole, and as NAME.rows the rows trained whole (rows, columns)
adapter_positions.safetensors   only where positions cannot be drawn again: int32 or int64 (n,) by parameter name
README.md                       the model card
"""

import dataclasses
import json
import mmap
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_zero.errors import UserError
from sparse_zero.selection import rules
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import STORED, STRATIFIED, Selection

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
POSITIONS_NAME = "adapter_positions.safetensors"
CARD_NAME = "README.md"
FORMAT_VERSION = 1
ROWS = ".rows"


class SelectedTensor(BaseModel):
    """What was drawn from one weight."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int]
    count: int = Field(gt=0)
    rule: Literal["stratified-v1", "bernoulli-v1", "stored"] = STRATIFIED
    seed: int = 0
    probability: float | None = None
    granularity: int = 1
    whole_rows: list[int] = []
    positions: str
    """Checksum of the positions, so that a changed rule can never place values wrongly."""

    @classmethod
    def describe(cls, selection: Selection, positions: torch.Tensor) -> "SelectedTensor":
        """Args: positions: int64 (count,)"""
        known = dataclasses.asdict(selection)
        del known["name"]
        known |= {"shape": list(selection.shape), "whole_rows": list(selection.whole_rows)}
        return cls(**known, positions=rules.checksum(positions))

    def selection(self, name: str) -> Selection:
        known = self.model_dump(exclude={"positions"})
        return Selection(name=name, **known | {"shape": tuple(self.shape), "whole_rows": tuple(self.whole_rows)})


class AdapterConfig(BaseModel):
    """adapter_config.json"""

    model_config = ConfigDict(extra="forbid")

    adapter_type: str = "sparse-zero"
    format_version: int = FORMAT_VERSION
    base_model_name_or_path: str | None
    revision: str | None
    base_fingerprint: dict[str, str] = {}
    """A short hash of each weight of the base model, by parameter name."""
    tokenizer: str | None = None
    new_tokens: list[str] = []
    """Tokens that were added to the tokenizer."""
    task: str | None
    dtype: str
    """Of the base model when the adapter was trained."""
    model_settings: dict[str, Any] = {}
    sparse: SparseConfig
    total_parameters: int
    trainable_parameters: int
    tensors: dict[str, SelectedTensor]
    modules_to_save: list[str]
    """The parameters that were trained whole."""
    results: dict[str, Any] = {}
    """Figures of the run, as the model card tells them."""
    files: dict[str, str] = {}
    """Checksum (xxh3, 128 bits) of each other file."""
    library_versions: dict[str, str] = {}


@dataclasses.dataclass
class Adapter:
    """An adapter in memory."""

    config: AdapterConfig
    deltas: dict[str, torch.Tensor]
    """(n,) of each selected weight, in the order of its positions, without rows trained whole."""
    whole: dict[str, torch.Tensor]
    """Parameters trained whole."""
    rows: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """(rows, columns) of the rows trained whole: their values, for what new rows held before is not to be known."""
    stored: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """int64 (n,) of each weight whose positions cannot be drawn again, rows trained whole included."""

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Adapter({config.trainable_parameters:,} of {config.total_parameters:,} scalars in "
            f"{len(config.tensors)} weights of {config.base_model_name_or_path})"
        )

    def copied(self) -> "Adapter":
        """With values of its own: those that were read are views of the file, which may be gone one day."""
        parts = {
            part: {name: tensor.clone() for name, tensor in getattr(self, part).items()}
            for part in ("deltas", "whole", "rows")
        }
        return dataclasses.replace(self, **parts)

    def positions(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns: int64 (count,), rows trained whole included."""
        return self.stored[name].to(device) if name in self.stored else self.selection(name).positions(device)

    def selection(self, name: str) -> Selection:
        return self.config.tensors[name].selection(name)


def row_mask(selection: Selection, positions: torch.Tensor) -> torch.Tensor:
    """Which positions are those of rows trained whole. Returns: bool (count,)"""
    rows = torch.tensor(selection.whole_rows, device=positions.device)
    return torch.isin(torch.div(positions, selection.shape[-1], rounding_mode="trunc"), rows)


def library_versions() -> dict[str, str]:
    names = ("torch", "transformers", "deepspeed", "sparse-zero")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def write_adapter(adapter: Adapter, directory: str | Path, card: str | None = None) -> None:
    """Write an adapter's files. The config comes last: without it, or with the old one, nothing opens by mistake.

    Args: card: the text of README.md.
    Raises UserError: the directory cannot be written.
    """
    directory = Path(directory)
    tensors = adapter.deltas | adapter.whole | {name + ROWS: values for name, values in adapter.rows.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = {WEIGHTS_NAME: _write_tensors(directory / WEIGHTS_NAME, tensors)}
        if adapter.stored:
            files[POSITIONS_NAME] = _write_tensors(directory / POSITIONS_NAME, _narrow(adapter))
        else:
            (directory / POSITIONS_NAME).unlink(missing_ok=True)
        if card is not None:
            _replace(directory / CARD_NAME, card)
        config = adapter.config.model_copy(update={"files": files})
        _replace(directory / CONFIG_NAME, config.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: the adapter cannot be written ({error})") from None


def _narrow(adapter: Adapter) -> dict[str, torch.Tensor]:
    fits = {name: adapter.selection(name).numel < 2**31 for name in adapter.stored}
    return {name: flat.to(torch.int32 if fits[name] else torch.int64) for name, flat in adapter.stored.items()}


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns: the file's checksum."""
    # The old file stays whole until the new one is; and a model may have it mapped.
    aside = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata={"format": "pt"})
    os.replace(aside, path)
    return _checksum_of_file(path)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def _checksum_of_file(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128(content).hexdigest()


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
        raise UserError(f"{path}: not a sparse-zero adapter; `sparse-zero convert` makes one of other formats")
    newer = raw.get("format_version")
    if isinstance(newer, int) and newer > FORMAT_VERSION:
        raise UserError(f"{path}: format {newer} is newer than {FORMAT_VERSION}, the newest that this version reads")
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter's files. Positions that can be drawn again are not drawn here.

    Returns: its values are views of the mapped file: no copy is made of what is to be copied into a model.

    Raises UserError: see `read_config`; a file that is missing, cut short, changed since, or that does not fit the
    config.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME, config)
    selected = {name: entry.selection(name) for name, entry in config.tensors.items()}
    counts = {name: selection.count - selection.whole_row_scalars for name, selection in selected.items()}
    shapes = {name: [count] for name, count in counts.items() if count}
    shapes |= {
        f"{n}{ROWS}": [len(selection.whole_rows), selection.shape[-1]]
        for n, selection in selected.items()
        if selection.whole_rows
    }
    _check_names(directory / WEIGHTS_NAME, tensors, {*shapes, *config.modules_to_save})
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise UserError(
                f"{directory / WEIGHTS_NAME}: '{name}' has shape {list(tensors[name].shape)}, "
                f"{CONFIG_NAME} says {', '.join(map(str, shape))}"
            )
    to_store = {name for name, selection in selected.items() if selection.rule == STORED}
    stored = _read_tensors(directory / POSITIONS_NAME, config) if to_store else {}
    _check_names(directory / POSITIONS_NAME, stored, to_store)
    adapter = Adapter(
        config=config,
        deltas={name: tensors[name] for name, count in counts.items() if count},
        whole={name: tensors[name] for name in config.modules_to_save},
        rows={name: tensors[name + ROWS] for name, selection in selected.items() if selection.whole_rows},
        stored={name: flat.to(torch.int64) for name, flat in stored.items()},
    )
    for name in to_store:
        _check_positions(adapter, name, directory)
    return adapter


def checked_positions(adapter: Adapter, name: str, directory: str | Path) -> torch.Tensor:
    """The positions of one weight: int64 (count,). Raises UserError where they are not those it was trained with."""
    flat = adapter.positions(name)
    _compare(rules.checksum(flat), adapter, name, directory)
    return flat


def checked_chunks(
    adapter: Adapter, name: str, directory: str | Path, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """The same some at a time. That they are not the right ones is known, and raised, after the last ones."""
    digest, stored = rules.Checksum(), adapter.stored.get(name)
    chunks = adapter.selection(name).chunks(device) if stored is None else rules.in_chunks(stored.to(device))
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    _compare(digest.hexdigest(), adapter, name, directory)


def _compare(checksum: str, adapter: Adapter, name: str, directory: str | Path) -> None:
    if checksum != adapter.config.tensors[name].positions:
        raise UserError(f"{directory}: the positions of '{name}' are not those that it was trained with")


def _check_positions(adapter: Adapter, name: str, directory: Path) -> None:
    flat, selection = checked_positions(adapter, name, directory), adapter.selection(name)
    if flat.numel() != selection.count or bool((flat.diff() <= 0).any()) or flat[0] < 0 or flat[-1] >= selection.numel:
        raise UserError(f"{directory / POSITIONS_NAME}: '{name}' are no positions of a weight of {selection.shape}")


def _check_names(path: Path, tensors: Mapping[str, torch.Tensor], expected: set[str]) -> None:
    if odd := sorted(tensors.keys() ^ expected):
        raise UserError(f"{path}: '{odd[0]}' is in only one of {path.name} and {CONFIG_NAME}")


def _read_tensors(path: Path, config: AdapterConfig) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
        checksum = _checksum_of_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    if checksum != config.files.get(path.name):
        raise UserError(f"{path}: damaged, or from another save (its checksum is not the one in {CONFIG_NAME})")
    return tensors


def adapter_bytes(directory: str | Path) -> int:
    """Bytes of an adapter's files, without its model card."""
    names = (CONFIG_NAME, WEIGHTS_NAME, POSITIONS_NAME)
    return sum(path.stat().st_size for path in (Path(directory) / name for name in names) if path.exists())
