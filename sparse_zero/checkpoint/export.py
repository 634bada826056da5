"""Exports a checkpoint as an adapter, without a GPU, without the base model, and with the memory of one tensor.

This module is the only one that knows both the checkpoint's and the adapter's format. In addition to the trained
values an adapter needs its config, which every manifest contains, and data that no optimizer changes and that cannot
be drawn again: stored positions, the base values of rows that are trained in full, and the buffers of modules that are
trained in full, such as BatchNorm's statistics. If there is such data, the checkpoint has it in fixed.safetensors.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_zero.adapters.files import (
    CARD_NAME,
    CONFIG_NAME,
    POSITIONS_NAME,
    WEIGHTS_NAME,
    Adapter,
    check_drawing,
    row_mask,
)
from sparse_zero.adapters.model_card import model_card
from sparse_zero.adapters.reading import VALUE_DTYPES
from sparse_zero.adapters.save_and_load import adapter_config
from sparse_zero.adapters.schema import ROWS_SUFFIX, AdapterConfig, checked_config
from sparse_zero.checkpoint.directory import FIXED_NAME, Checkpoint, newest_complete
from sparse_zero.checkpoint.listing import MANIFEST_NAME
from sparse_zero.checkpoint.shards import Entry, FileRecord, TensorFile, write_tensors
from sparse_zero.errors import UserError
from sparse_zero.model.finite import describe
from sparse_zero.model.sparsity import read_values, sparsity_of
from sparse_zero.model.weight import SparseWeight
from sparse_zero.model.wrappers import unwrap
from sparse_zero.selection.checks import checked_chunks, checksum
from sparse_zero.selection.draws import in_chunks
from sparse_zero.selection.rules import STORED, Selection
from sparse_zero.zero.partitions import VALUE
from sparse_zero.zero.resharding import parameter_offsets, plan_reads

logger = logging.getLogger(__name__)

_CHUNK_SCALARS = 2**20
_FILES = (WEIGHTS_NAME, POSITIONS_NAME, CONFIG_NAME)
_POSITIONS, _BASE, _BUFFER = "positions.", "base.", "buffer."


def describe_adapter(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json for a sparse model. Every checkpoint contains it."""
    sparsity = sparsity_of(model)
    return adapter_config(unwrap(model), sparsity, _LazyPositions(sparsity.weights)).model_dump(mode="json")


class _LazyPositions(Mapping[str, torch.Tensor]):
    """Computes the positions of one weight at a time: all positions together may be larger than a shard."""

    def __init__(self, weights: Mapping[str, SparseWeight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name].flat_positions()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def fixed_entries(model: nn.Module) -> list[Entry]:
    """The tensors of fixed.safetensors: what an adapter needs besides the trained values. Empty if there are none."""
    sparsity = sparsity_of(model)
    entries = buffer_entries(model, sparsity.buffers)
    for name, weight in sparsity.weights.items():
        if weight.selection.rule == STORED:
            entries.append(
                Entry(_POSITIONS + name, _index_dtype(weight.selection), (weight.selection.count,), _positions(weight))
            )
        if weight.selection.whole_rows:
            entries.append(
                Entry(_BASE + name, weight.base.dtype, (weight.selection.whole_row_scalars,), _base_rows(weight))
            )
    return entries


def buffer_entries(model: nn.Module, names: list[str]) -> list[Entry]:
    """Buffers of a model as tensors of fixed.safetensors."""
    buffers = read_values(unwrap(model), names).items()
    return [Entry(_BUFFER + name, each.dtype, tuple(each.shape), [each.flatten()]) for name, each in buffers]


def _positions(weight: SparseWeight) -> Iterator[torch.Tensor]:
    yield weight.flat_positions()


def _base_rows(weight: SparseWeight) -> Iterator[torch.Tensor]:
    yield weight.base[row_mask(weight.selection, weight.flat_positions())]


def read_buffers(checkpoint: Checkpoint, model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The buffers of modules that are trained in full, by name. Those of a checkpoint of version 0.1 are not in it.

    Args: names: of these buffers in the model.

    Raises UserError: the file is damaged, or a buffer does not fit the model's.
    """
    own = read_values(unwrap(model), names)
    record = checkpoint.manifest.files.get(FIXED_NAME)
    if not own or record is None:
        return {}
    with TensorFile(checkpoint.directory / FIXED_NAME, record) as file:
        saved = {name: buffer for name, buffer in own.items() if _BUFFER + name in file.names()}
        for name, buffer in saved.items():
            file.check(
                _BUFFER + name, tuple(buffer.shape), *(VALUE_DTYPES if buffer.is_floating_point() else [buffer.dtype])
            )
        return {name: file.tensor(_BUFFER + name).view(buffer.shape) for name, buffer in saved.items()}


def read_positions(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The positions that cannot be drawn again, int64 (n,), by parameter name.

    Raises UserError: a file of the checkpoint is damaged.
    """
    with _AdapterTensors(checkpoint) as tensors:
        return {entry.name: torch.cat([*entry.chunks]).long() for entry in tensors.positions()}


def _index_dtype(selection: Selection) -> torch.dtype:
    return torch.int32 if selection.numel < 2**31 else torch.int64


def export(checkpoint: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the adapter of a checkpoint.

    Args:
        checkpoint: a checkpoint, or a run's directory, of which the newest complete checkpoint is exported.
        out: the adapter's directory.

    Returns: facts for the user: the paths, the step, the number of shards and of trained parameters, bytes, seconds.

    Raises UserError: there is no complete checkpoint, a file of it is damaged, or `out` cannot be written.
    """
    started = time.perf_counter()
    found, out = _find(Path(checkpoint)), Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give the path of a directory")
    with _AdapterTensors(found) as tensors:
        weights, positions = tensors.weights(), tensors.positions()
        is_new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            files = _write(tensors.config, {WEIGHTS_NAME: weights, POSITIONS_NAME: positions}, out)
        except OSError as error:
            raise UserError(f"{out}: the adapter cannot be written ({error.strerror})") from None
        finally:
            for name in _FILES:
                (out / f"{name}.tmp").unlink(missing_ok=True)
            if is_new and out.is_dir() and not any(out.iterdir()):
                out.rmdir()
        if tensors.not_finite:
            logger.warning("%s: exported values that are NaN or infinite: %s", out, describe(tensors.not_finite))
    return {
        "checkpoint": str(found.directory),
        "step": found.step,
        "adapter": str(out),
        "shards": len(found.manifest.shards),
        "trainable_parameters": sum(found.manifest.sizes().values()),
        "bytes": sum(record.bytes for record in files.values()),
        "seconds": time.perf_counter() - started,
    }


def _find(path: Path) -> Checkpoint:
    found, problems = newest_complete(path)
    if found is not None:
        return found
    if problems:
        raise UserError(problems[0])
    return Checkpoint(path)


def _write(config: AdapterConfig, contents: Mapping[str, list[Entry]], out: Path) -> dict[str, FileRecord]:
    """Write each file under a temporary name first, and the config last: an incomplete adapter does not open."""
    files = {}
    for name, entries in contents.items():
        if entries:
            files[name] = write_tensors(out / f"{name}.tmp", entries, {"format": "pt"})
    for name in contents:
        if name in files:
            (out / f"{name}.tmp").replace(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    config = config.model_copy(update={"files": {name: record.xxh3_128 for name, record in files.items()}})
    (out / CARD_NAME).write_text(model_card(config))
    temporary = out / f"{CONFIG_NAME}.tmp"
    temporary.write_text(config.model_dump_json(indent=2) + "\n")
    temporary.replace(out / CONFIG_NAME)
    return files


class _AdapterTensors:
    """The tensors of the adapter in a checkpoint. They are read when they are written."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UserError: the description of the adapter is damaged, or does not fit the rest of the manifest."""
        self._checkpoint, self._manifest = checkpoint, checkpoint.manifest
        self._manifest_path = checkpoint.directory / MANIFEST_NAME
        if (method := self._manifest.adapter.get("method")) is not None:
            raise UserError(
                f"{checkpoint.directory}: is a checkpoint of training.method: {method}; only those of sparse runs are "
                "exported: end the run with `sparse-zero train RECIPE --resume`, which writes its result"
            )
        self.config = checked_config(self._manifest.adapter, f"{self._manifest_path}: adapter")
        self.not_finite: dict[str, int] = {}
        """The number of NaN and infinite values of each parameter that was read."""
        self._sizes = self._manifest.sizes()
        self._begins = parameter_offsets(self._sizes)
        self._open: tuple[str, TensorFile] | None = None
        self._check_names()
        check_drawing(Adapter(self.config, {}, {}), self._manifest_path)

    def _check_names(self) -> None:
        trained, selected = {parameter.name: parameter for parameter in self._manifest.parameters}, self.config.tensors
        whole = {name for name in self.config.modules_to_save if name in trained}
        if odd := sorted(trained.keys() ^ (selected.keys() | whole)):
            raise UserError(f"{self._manifest_path}: damaged: '{odd[0]}' is in only one of `parameters` and `adapter`")
        for name, entry in selected.items():
            if trained[name].shape != [entry.count]:
                raise UserError(
                    f"{self._manifest_path}: damaged: '{name}' has {trained[name].shape} values for {entry.count} "
                    "positions"
                )

    def __enter__(self) -> "_AdapterTensors":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open[1].close()

    def weights(self) -> list[Entry]:
        entries = []
        for parameter in self._manifest.parameters:
            name, dtype, shape = parameter.name, getattr(torch, parameter.dtype), tuple(parameter.shape)
            selected = self.config.tensors.get(name)
            selection = selected.selection(name) if selected else None
            if selection is None or not selection.whole_rows:
                entries.append(Entry(name, dtype, shape, self._values(name)))
                continue
            if others := selection.count - selection.whole_row_scalars:
                entries.append(Entry(name, dtype, (others,), self._outside_rows(name, dtype)))
            rows = (len(selection.whole_rows), selection.shape[-1])
            entries.append(Entry(name + ROWS_SUFFIX, dtype, rows, self._rows(name, dtype)))
        trained = {parameter.name for parameter in self._manifest.parameters}
        for name in self.config.modules_to_save:
            if name not in trained:
                file = self._fixed_file()
                dtype, shape = file.dtype(_BUFFER + name), file.shape(_BUFFER + name)
                entries.append(Entry(name, dtype, shape, self._fixed(_BUFFER + name)))
        return entries

    def positions(self) -> list[Entry]:
        entries = []
        for name, selected in self.config.tensors.items():
            if selected.rule == STORED:
                dtype = _index_dtype(selected.selection(name))
                entries.append(Entry(name, dtype, (selected.count,), self._lazily(name)))
        return entries

    def _lazily(self, name: str) -> Iterator[torch.Tensor]:
        yield self._stored_positions(name)

    def _stored_positions(self, name: str) -> torch.Tensor:
        """int64 (count,)"""
        entry, file = self.config.tensors[name], self._fixed_file()
        file.check(_POSITIONS + name, (entry.count,), torch.int32, torch.int64)
        flat = file.tensor(_POSITIONS + name).long()
        if checksum(torch.cat([*checked_chunks(entry.selection(name), in_chunks(flat))])) != entry.positions:
            raise UserError(f"{file.path}: damaged: the positions of '{name}' differ from those it was trained with")
        return flat

    def _outside_rows(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        yield torch.cat(list(self._values(name)))[~self._row_mask(name)]

    def _rows(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        # As save_adapter does: round to the dtype of the trained parameter before the addition.
        values = torch.cat(list(self._values(name)))[self._row_mask(name)].to(dtype)
        file, selection = self._fixed_file(), self.config.tensors[name].selection(name)
        file.check(_BASE + name, (selection.whole_row_scalars,), *VALUE_DTYPES)
        base = file.tensor(_BASE + name)
        yield base.to(torch.promote_types(base.dtype, dtype)) + values

    def _row_mask(self, name: str) -> torch.Tensor:
        selection = self.config.tensors[name].selection(name)
        flat = self._stored_positions(name) if selection.rule == STORED else selection.positions()
        return row_mask(selection, flat)

    def _fixed(self, name: str) -> Iterator[torch.Tensor]:
        yield self._fixed_file().tensor(name)

    def _fixed_file(self) -> TensorFile:
        if FIXED_NAME not in self._manifest.files:
            raise UserError(f"{self._manifest_path}: damaged: {FIXED_NAME} is not among the files")
        return self._file(FIXED_NAME, self._manifest.files[FIXED_NAME])

    def _values(self, name: str) -> Iterator[torch.Tensor]:
        """The float32 values of a parameter, in 1-D chunks, from the shards that contain them."""
        begin = self._begins[name]
        for read in plan_reads([(begin, begin + self._sizes[name])], [s.spans for s in self._manifest.shards]):
            shard = self._manifest.shards[read.shard]
            count = sum(end - start for start, end in shard.spans)
            for start in range(read.shard_offset, read.shard_offset + read.count, _CHUNK_SCALARS):
                piece = torch.empty(min(_CHUNK_SCALARS, read.shard_offset + read.count - start))
                file = self._file(shard.name, shard.file)
                file.check(VALUE, (count,), torch.float32)
                file.copy(VALUE, start, piece)
                if odd := int((~piece.isfinite()).sum()):
                    self.not_finite[name] = self.not_finite.get(name, 0) + odd
                yield piece

    def _file(self, name: str, record: FileRecord) -> TensorFile:
        if self._open is None or self._open[0] != name:
            self.__exit__()
            self._open = name, TensorFile(self._checkpoint.directory / name, record)
        return self._open[1]
