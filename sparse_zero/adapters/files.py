"""The files of an adapter directory. They are read, checked and written without a model.

adapter_config.json             the base model and its fingerprint, the task, the selection of each weight, checksums
adapter_model.safetensors       by the base model's parameter names: deltas (n,) of the selected scalars, fully trained
                                parameters, and as NAME.rows the fully trained rows of a matrix (rows, columns)
adapter_positions.safetensors   only for positions that cannot be drawn again: int32 or int64 (n,) by parameter name
README.md                       the model card
"""

import dataclasses
import mmap
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparse_zero.adapters.base_path import find_base
from sparse_zero.adapters.reading import VALUE_DTYPES, read_json, read_safetensors
from sparse_zero.adapters.schema import ROWS_SUFFIX, AdapterConfig, checked_config
from sparse_zero.errors import UserError, disk_problem
from sparse_zero.model.finite import count_not_finite, describe
from sparse_zero.selection import checks, draws
from sparse_zero.selection.draws import BERNOULLI
from sparse_zero.selection.rules import STORED, Selection

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
POSITIONS_NAME = "adapter_positions.safetensors"
CARD_NAME = "README.md"
FREE_VISITS, VISITS_PER_VALUE = 2**25, 2**17
"""How many scalars are visited to draw positions whose weight is not known: seconds at most, or a density of 1e-5."""


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

    def not_finite(self) -> dict[str, int]:
        """The number of values that are NaN or infinite, by name, without zeros."""
        parts = (self.deltas, self.rows, self.whole)
        return count_not_finite(item for part in parts for item in part.items())

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
    except (OSError, SafetensorError) as error:
        if (problem := disk_problem(error)) is None:
            raise
        raise UserError(f"{directory}: the adapter cannot be written ({problem})") from error


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
    if not os.path.lexists(path):
        raise UserError(f"{directory}: not an adapter directory (it has no {CONFIG_NAME})")
    content = read_json(path)
    if content.get("peft_type") == "LORA":
        raise UserError(
            f"{path}: an adapter of PEFT's LoRA: `sparse-zero evaluate` evaluates it; merge it with PEFT "
            "(PeftModel.from_pretrained, merge_and_unload), or train with `--merge`, and use the merged model"
        )
    if content.get("adapter_type") != "sparse-zero":
        raise UserError(f"{path}: not a sparse-zero adapter; `sparse-zero convert` converts some other formats")
    config = checked_config(content, path)
    base = find_base(config.base_model_name_or_path, Path(directory))
    return config.model_copy(update={"base_model_name_or_path": base})


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
    for name, values in tensors.items():
        check_dtype(directory / WEIGHTS_NAME, name, values, name in config.modules_to_save)
    with_positions = {name: selection for name, selection in selected.items() if selection.rule == STORED}
    positions = _read_tensors(directory / POSITIONS_NAME, config) if with_positions else {}
    _check_names(directory / POSITIONS_NAME, positions, {*with_positions})
    for name, selection in with_positions.items():
        _check_positions(directory / POSITIONS_NAME, positions[name], selection)
    adapter = Adapter(
        config=config,
        deltas={name: tensors[name] for name, count in counts.items() if count},
        whole={name: tensors[name] for name in config.modules_to_save},
        rows={name: tensors[name + ROWS_SUFFIX] for name, selection in selected.items() if selection.whole_rows},
        stored_positions={name: flat.to(torch.int64) for name, flat in positions.items()},
    )
    for name in with_positions:
        checked_positions(adapter, name, directory)
    return adapter


def checked_positions(adapter: Adapter, name: str, directory: str | Path) -> torch.Tensor:
    """The positions of a selected weight, int64 (count,). Raises UserError if their checksum is wrong."""
    return torch.cat([*checked_position_chunks(adapter, name, directory)])


def checked_position_chunks(
    adapter: Adapter, name: str, directory: str | Path, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """`checked_positions` in chunks. If the checksum is wrong, UserError is raised after the last chunk."""
    digest, stored, selection = checks.Checksum(), adapter.stored_positions.get(name), adapter.selection(name)
    try:
        for chunk in selection.chunks(device) if stored is None else draws.in_chunks(stored.to(device)):
            digest.update(chunk)
            yield chunk
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    if digest.hexdigest() != adapter.config.tensors[name].positions:
        raise UserError(f"{directory}: the positions of '{name}' differ from those it was trained with")


def check_finite(adapter: Adapter, origin: str | Path, hint: str = "") -> None:
    """Raise UserError if an adapter has values that are NaN or infinite. Args: hint: the end of the message."""
    if counts := adapter.not_finite():
        raise UserError(f"{origin}: has values that are NaN or infinite: {describe(counts)}{hint}")


def check_drawing(adapter: Adapter, origin: str | Path) -> None:
    """Raise UserError if drawing an adapter's positions takes far longer than its values justify.

    The rule bernoulli-v1 visits all scalars of a weight, whose shape is a claim until there is a model.
    """
    drawn = [entry for entry in adapter.config.tensors.values() if entry.rule == BERNOULLI]
    visited, count = sum(torch.Size(entry.shape).numel() for entry in drawn), sum(entry.count for entry in drawn)
    if visited > max(FREE_VISITS, VISITS_PER_VALUE * count):
        raise UserError(
            f"{origin}: claims weights of {visited:,} scalars for {count:,} values: too many to draw the positions "
            "without the base model's weights"
        )


def check_dtype(path: Path, name: str, values: torch.Tensor, whole: bool = False) -> None:
    """Raise UserError if values are not floating-point numbers of VALUE_DTYPES. Args: whole: fully trained values."""
    if whole and not (values.is_complex() or values.is_floating_point()):
        return  # a buffer, which is compared with the model's
    if values.dtype not in VALUE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in VALUE_DTYPES)
        raise UserError(f"{path}: the values of '{name}' are {values.dtype}; they can be {known}")


def _check_positions(path: Path, flat: torch.Tensor, selection: Selection) -> None:
    fits = flat.dtype in (torch.int32, torch.int64) and tuple(flat.shape) == (selection.count,)
    if not fits or bool((flat.diff() <= 0).any()) or flat[0] < 0 or flat[-1] >= selection.numel:
        raise UserError(
            f"{path}: damaged: the positions of '{selection.name}' are not valid for its shape {list(selection.shape)}"
        )


def _check_names(path: Path, tensors: Mapping[str, torch.Tensor], expected: set[str]) -> None:
    if odd := sorted(tensors.keys() ^ expected):
        raise UserError(f"{path}: '{odd[0]}' is in only one of {path.name} and {CONFIG_NAME}")


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
    paths = (path for pattern in _ANY_FORMAT for path in Path(directory).glob(pattern))
    return sum(path.stat().st_size for path in paths if path.is_file())
