"""Writes a checkpoint on all ranks together. Each rank writes one shard."""

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparse_zero.checkpoint import random_states
from sparse_zero.checkpoint.directory import (
    FIXED_NAME,
    SETTINGS_NAME,
    TRAINER_STATE_NAME,
    delete_old,
    publish,
    temporary_path,
)
from sparse_zero.checkpoint.listing import checkpoint_path
from sparse_zero.checkpoint.manifest import Manifest, ParameterRecord, ShardRecord, shard_name, write_manifest
from sparse_zero.checkpoint.settings import Settings
from sparse_zero.checkpoint.shards import Entry, write_bytes, write_tensors
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.zero.parameters import full_shape
from sparse_zero.zero.partitions import VALUE, Partition
from sparse_zero.zero.resharding import Span, even_slice, merge_spans, parameter_offsets

logger = logging.getLogger(__name__)

Pieces = dict[str, list[torch.Tensor]]
"""1-D tensors by kind (value, exp_avg, ...), in the order of a shard's spans."""


@dataclass
class PendingCheckpoint:
    """A checkpoint that is being written."""

    directory: Path
    """Its final path."""
    written: Path
    """Its path until it is complete."""
    manifest: Manifest
    """Without shards and files, which are known when all is written."""
    trainer_state: str
    fixed: list[Entry]
    thread: threading.Thread | None = None
    record: ShardRecord | None = None
    error: BaseException | None = None


class CheckpointWriter:
    """Writes the checkpoints of one run. `save` and `finish` are collective calls."""

    def __init__(self, ranks: Ranks, output: Path, run: str, keep: int | None) -> None:
        """
        Args:
            ranks: all ranks.
            output: the run's directory.
            run: the run's ID.
            keep: how many checkpoints to keep; None: all.
        """
        self.ranks, self.output, self.run, self.keep = ranks, output, run, keep
        self.best: str | None = None
        """The path of the best checkpoint, which is kept at any age."""
        self.settings: Settings = {}
        """What every checkpoint contains as settings.json."""
        self._pending: PendingCheckpoint | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its shard of the last save. Not a collective call."""
        return self._pending is not None and self._pending.thread is not None and self._pending.thread.is_alive()

    @property
    def has_pending(self) -> bool:
        """Whether a save must still be finished. The same on every rank."""
        return self._pending is not None

    def save(
        self,
        manifest: Manifest,
        partition: Partition,
        trainer_state: str,
        fixed: list[Entry],
        running_loss: float,
        states: Mapping[str, torch.Tensor],
        in_background: bool = False,
    ) -> None:
        """Write a checkpoint.

        Args:
            manifest: without shards and files.
            partition: this rank's trained scalars and moments.
            trainer_state: the text of trainer_state.json, from rank 0.
            fixed: the tensors of fixed.safetensors, from rank 0.
            running_loss: this rank's losses since the last line of the log.
            states: this rank's random states, see `random_states.capture`.
            in_background: only copy this rank's part now, and write it in a thread. `finish` publishes the checkpoint.

        Raises UserError on every rank if a rank could not write. Then nothing of the checkpoint is left.
        """
        self.finish()
        directory = checkpoint_path(self.output, manifest.step)
        pending = PendingCheckpoint(directory, temporary_path(directory, self.run), manifest, trainer_state, fixed)
        spans, pieces = _own_shard(partition, manifest, self.ranks)
        if in_background:
            pieces = {kind: [p.to("cpu", torch.float32, copy=True) for p in each] for kind, each in pieces.items()}

        def write() -> None:
            try:
                pending.record = self._write_shard(pending, spans, pieces, states, running_loss)
            except BaseException as error:  # raised again by finish, in the main thread
                pending.error = error

        self._pending = pending
        if in_background:
            pending.thread = threading.Thread(target=write, name="checkpoint")
            pending.thread.start()
        else:
            write()
            self.finish()

    def finish(self) -> Path | None:
        """Wait until all shards are written, and publish the checkpoint.

        Returns: the checkpoint's directory; None if no save was pending.

        Raises UserError on every rank if a rank could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.thread is not None:
            pending.thread.join()
        if pending.error is not None and not isinstance(pending.error, OSError):
            raise pending.error
        records = self.ranks.gather(pending.record if pending.error is None else _describe(pending.error))
        failures = [f"rank {rank}: {record}" for rank, record in enumerate(records) if isinstance(record, str)]
        failure = failures[0] if failures else None
        if self.ranks.rank == 0 and failure is None:
            try:
                self._complete(pending, records)
            except OSError as error:
                failure = f"rank 0: {_describe(error)}"
        failure = self.ranks.gather(failure)[0]
        if failure is not None:
            if self.ranks.rank == 0:
                shutil.rmtree(pending.written, ignore_errors=True)
            raise UserError(f"{pending.directory}: not saved: {failure}")
        return pending.directory

    def _write_shard(
        self,
        pending: PendingCheckpoint,
        spans: list[Span],
        pieces: Pieces,
        states: Mapping[str, torch.Tensor],
        loss: float,
    ) -> ShardRecord:
        pending.written.mkdir(parents=True, exist_ok=True)
        rank, count = self.ranks.rank, self.ranks.world_size
        name = shard_name(rank, count)
        size = sum(end - start for start, end in spans)
        entries = [Entry(kind, torch.float32, (size,), chunks) for kind, chunks in pieces.items()]
        # Bytes follow the floats, so that all floats are aligned and a reader can map them into memory.
        entries += [Entry(random_states.PREFIX + key, torch.uint8, (s.numel(),), [s]) for key, s in states.items()]
        metadata = {"run": self.run, "step": str(pending.manifest.step), "rank": str(rank), "ranks": str(count)}
        path = pending.written / name
        try:
            record = write_tensors(path, entries, metadata)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        return ShardRecord(name=name, file=record, spans=spans, running_loss=loss)

    def _complete(self, pending: PendingCheckpoint, records: list[ShardRecord]) -> None:
        names = {record.name for record in records}
        for file in pending.written.iterdir():
            if file.name not in names:
                file.unlink()
        for record in records:
            size = (pending.written / record.name).stat().st_size
            if size != record.file.bytes:
                raise OSError(0, f"the file has {size} bytes, but its rank wrote {record.file.bytes}", record.name)
        files = {
            TRAINER_STATE_NAME: write_bytes(pending.written / TRAINER_STATE_NAME, [pending.trainer_state.encode()])
        }
        if self.settings:
            text = json.dumps(self.settings, indent=2) + "\n"
            files[SETTINGS_NAME] = write_bytes(pending.written / SETTINGS_NAME, [text.encode()])
        if pending.fixed:
            files[FIXED_NAME] = write_tensors(pending.written / FIXED_NAME, pending.fixed, {"run": self.run})
        manifest = pending.manifest.model_copy(update={"shards": records, "files": files})
        write_manifest(pending.written, manifest)
        publish(pending.written, pending.directory)
        delete_old(self.output, self.keep, self.best, pending.directory)


def _describe(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    hint = " (all ranks must share training.output_dir)" if isinstance(error, FileNotFoundError) else ""
    return f"{place}{error.strerror or error}{hint}"


def _own_shard(partition: Partition, manifest: Manifest, ranks: Ranks) -> tuple[list[Span], Pieces]:
    """The spans and the tensors that this rank writes."""
    begins = parameter_offsets(manifest.sizes())
    total = sum(manifest.sizes().values())
    low, high = even_slice(total, ranks.rank, ranks.world_size) if partition.is_replicated else (0, total)
    spans: list[Span] = []
    pieces: Pieces = {kind: [] for kind in (VALUE, *manifest.moments)}
    for fragment in partition.fragments:
        start = begins[fragment.name] + fragment.start
        first, last = max(start, low), min(start + fragment.count, high)
        if first < last:
            spans.append((first, last))
            for kind, chunks in pieces.items():
                chunks.append(partition.view(fragment, kind)[first - start : last - start])
    return merge_spans(spans), pieces


def describe_parameters(
    parameters: Mapping[str, nn.Parameter], partition: Partition, ranks: Ranks
) -> list[ParameterRecord]:
    """The manifest's records of the trained parameters. A collective call, because a rank may have no scalar of some
    parameters.
    """
    steps: dict[str, int] = {}
    for of_rank in [partition.steps()] if partition.is_replicated else ranks.gather(partition.steps()):
        steps |= of_rank
    return [
        ParameterRecord(
            name=name, shape=list(full_shape(p)), dtype=str(p.dtype).removeprefix("torch."), steps=steps[name]
        )
        for name, p in parameters.items()
    ]
