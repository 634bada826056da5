"""A checkpoint's shards as an adapter: no GPU, no base model, and no more memory than a block of a shard."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_zero.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, _describe_adapter
from sparse_zero.checkpoint import Checkpoint, newest_complete
from sparse_zero.errors import UserError
from sparse_zero.model import sparsity_of, unwrap
from sparse_zero.partitions import VALUE
from sparse_zero.shards import Entry, TensorFile, write_tensors
from sparse_zero.spans import Read, offsets, plan_reads

_CHUNK_SCALARS = 2**20


def describe_adapter(model: nn.Module) -> dict[str, Any]:
    """What adapter_config.json says of a sparse model; it goes into every checkpoint."""
    return _describe_adapter(unwrap(model), sparsity_of(model)).model_dump(mode="json")


def export(checkpoint: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the adapter of a checkpoint, or of the newest complete one of a run's directory.

    Returns: facts for the user. Raises UserError: no complete checkpoint, a damaged one (the message names the file),
    `out` cannot be written.
    """
    started = time.perf_counter()
    found, out = _open(Path(checkpoint)), Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; an adapter is a directory")
    manifest = found.manifest
    config = AdapterConfig.model_validate(manifest.adapter)
    with _Shards(found) as shards:
        entries = [
            Entry(p.name, getattr(torch, p.dtype), tuple(p.shape), shards.values(p.name)) for p in manifest.parameters
        ]
        try:
            out.mkdir(parents=True, exist_ok=True)
            aside = out / f"{WEIGHTS_NAME}.tmp"
            record = write_tensors(aside, entries, {"format": "pt"})
            aside.rename(out / WEIGHTS_NAME)
            (out / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return {
        "checkpoint": str(found.directory),
        "step": manifest.step,
        "adapter": str(out),
        "shards": len(manifest.shards),
        "trainable_parameters": sum(manifest.sizes().values()),
        "bytes": record.bytes,
        "seconds": time.perf_counter() - started,
    }


def _open(path: Path) -> Checkpoint:
    found, problems = newest_complete(path)
    if found is not None:
        return found
    if problems:
        raise UserError(problems[0])
    return Checkpoint(path)


class _Shards:
    """The float32 values of a checkpoint, from whichever shard holds them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._manifest = checkpoint, checkpoint.manifest
        self._sizes = self._manifest.sizes()
        self._begins = offsets(self._sizes)
        self._open: tuple[int, TensorFile] | None = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open[1].close()

    def values(self, name: str) -> Iterator[torch.Tensor]:
        """Returns: 1-D chunks of a parameter's values."""
        begin = self._begins[name]
        for read in plan_reads([(begin, begin + self._sizes[name])], [s.spans for s in self._manifest.shards]):
            yield from self._read(read)

    def _read(self, read: Read) -> Iterator[torch.Tensor]:
        file = self._file(read.shard)
        for start in range(read.at, read.at + read.count, _CHUNK_SCALARS):
            chunk = torch.empty(min(_CHUNK_SCALARS, read.at + read.count - start))
            file.copy(VALUE, start, chunk)
            yield chunk

    def _file(self, number: int) -> TensorFile:
        if self._open is None or self._open[0] != number:
            self.__exit__()
            shard = self._manifest.shards[number]
            self._open = number, TensorFile(self._checkpoint.directory / shard.name, shard.file)
        return self._open[1]
