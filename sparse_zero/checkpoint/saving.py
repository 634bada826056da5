"""Saving and loading a run's state, all ranks together: each writes and reads its own part of it."""

import bisect
import logging
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from sparse_zero.checkpoint.directory import (
    FIXED_NAME,
    Checkpoint,
    Manifest,
    ParameterRecord,
    ShardRecord,
    aside,
    checkpoint_directory,
    delete_old,
    publish,
    write_manifest,
)
from sparse_zero.checkpoint.shards import Entry, TensorFile, write_bytes, write_tensors
from sparse_zero.errors import UserError
from sparse_zero.ranks.agreement import Ranks
from sparse_zero.zero.parameters import full_shape
from sparse_zero.zero.partitions import VALUE, Partition
from sparse_zero.zero.resharding import Span, even_share, merged, offsets, plan_reads

logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
RNG_PREFIX = "random."

Pieces = dict[str, list[torch.Tensor]]
"""By kind (value, exp_avg, ...): 1-D tensors, in the order of a shard's spans."""


@dataclass
class Pending:
    """A checkpoint on its way to the disk."""

    directory: Path
    written: Path
    manifest: Manifest
    """Without shards and files: those are known when all is written."""
    trainer_state: str
    fixed: list[Entry]
    thread: threading.Thread | None = None
    record: ShardRecord | None = None
    error: BaseException | None = None


class CheckpointWriter:
    """Writes the checkpoints of one run. `save` and `finish` are collective."""

    def __init__(self, ranks: Ranks, output: Path, run: str, keep: int | None) -> None:
        """Args: output: the run's directory; run: its id; keep: how many checkpoints to keep, None: all."""
        self.ranks, self.output, self.run, self.keep = ranks, output, run, keep
        self.best: str | None = None
        """The checkpoint that is kept whatever its age."""
        self._pending: Pending | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of the last save is still on its way. Not collective."""
        return self._pending is not None and self._pending.thread is not None and self._pending.thread.is_alive()

    @property
    def has_pending(self) -> bool:
        """Whether a save is to be finished. The same on every rank."""
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
        """Write a checkpoint; in the background only a copy of this rank's part is made before this returns, and
        `finish` makes the checkpoint visible.

        Args: manifest: without shards and files; trainer_state, fixed: the main process's; running_loss, states: this
            rank's, see rng.capture.
        Raises UserError on every rank where one could not write: then nothing of it is left.
        """
        self.finish()
        directory = checkpoint_directory(self.output, manifest.step)
        pending = Pending(directory, aside(directory, self.run), manifest, trainer_state, fixed)
        spans, pieces = _own_part(partition, manifest, self.ranks)
        if in_background:
            pieces = {kind: [p.to("cpu", torch.float32, copy=True) for p in each] for kind, each in pieces.items()}

        def write() -> None:
            try:
                pending.record = self._write_shard(pending, spans, pieces, states, running_loss)
            except BaseException as error:  # raised again by finish, in the thread that trains
                pending.error = error

        self._pending = pending
        if in_background:
            pending.thread = threading.Thread(target=write, name="checkpoint")
            pending.thread.start()
        else:
            write()
            self.finish()

    def finish(self) -> Path | None:
        """Wait for what is being written and make it visible. Returns: its directory; None where nothing was pending.

        Raises UserError on every rank where one could not write.
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
        self, pending: Pending, spans: list[Span], pieces: Pieces, states: Mapping[str, torch.Tensor], loss: float
    ) -> ShardRecord:
        pending.written.mkdir(parents=True, exist_ok=True)
        rank, count = self.ranks.rank, self.ranks.count
        name = f"shard-{rank:05d}-of-{count:05d}.safetensors"
        size = sum(end - start for start, end in spans)
        entries = [Entry(kind, torch.float32, (size,), chunks) for kind, chunks in pieces.items()]
        # Bytes come last, so that all floats stand where a reader can map them.
        entries += [Entry(RNG_PREFIX + key, torch.uint8, (s.numel(),), [s]) for key, s in states.items()]
        metadata = {"run": self.run, "step": str(pending.manifest.step), "rank": str(rank), "ranks": str(count)}
        path = pending.written / name
        try:
            record = write_tensors(path, entries, metadata)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        return ShardRecord(name=name, file=record, spans=spans, running_loss=loss)

    def _complete(self, pending: Pending, records: list[ShardRecord]) -> None:
        wanted = {record.name for record in records}
        for stray in pending.written.iterdir():
            if stray.name not in wanted:
                stray.unlink()
        for record in records:
            size = (pending.written / record.name).stat().st_size
            if size != record.file.bytes:
                raise OSError(0, f"the file has {size} bytes, its rank wrote {record.file.bytes}", record.name)
        files = {
            TRAINER_STATE_NAME: write_bytes(pending.written / TRAINER_STATE_NAME, [pending.trainer_state.encode()])
        }
        if pending.fixed:
            files[FIXED_NAME] = write_tensors(pending.written / FIXED_NAME, pending.fixed, {"run": self.run})
        manifest = pending.manifest.model_copy(update={"shards": records, "files": files})
        write_manifest(pending.written, manifest)
        publish(pending.written, pending.directory)
        delete_old(self.output, self.keep, self.best)


def _describe(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    hint = " (all ranks must see one directory)" if isinstance(error, FileNotFoundError) else ""
    return f"{place}{error.strerror or error}{hint}"


def _own_part(partition: Partition, manifest: Manifest, ranks: Ranks) -> tuple[list[Span], Pieces]:
    """What this rank writes."""
    begins = offsets(manifest.sizes())
    total = sum(manifest.sizes().values())
    low, high = even_share(total, ranks.rank, ranks.count) if partition.is_replicated else (0, total)
    spans: list[Span] = []
    pieces: Pieces = {kind: [] for kind in (VALUE, *manifest.moments)}
    for fragment in partition.fragments:
        start = begins[fragment.name] + fragment.start
        first, last = max(start, low), min(start + fragment.count, high)
        if first < last:
            spans.append((first, last))
            for kind, chunks in pieces.items():
                chunks.append(partition.view(fragment, kind)[first - start : last - start])
    return merged(spans), pieces


def describe_parameters(
    parameters: Mapping[str, nn.Parameter], partition: Partition, ranks: Ranks
) -> list[ParameterRecord]:
    """Collective: of some parameters this rank may hold nothing."""
    steps: dict[str, int] = {}
    for of_rank in [partition.steps()] if partition.is_replicated else ranks.gather(partition.steps()):
        steps |= of_rank
    return [
        ParameterRecord(
            name=name, shape=list(full_shape(p)), dtype=str(p.dtype).removeprefix("torch."), steps=steps[name]
        )
        for name, p in parameters.items()
    ]


def load_partition(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    partition: Partition,
    ranks: Ranks,
    with_moments: bool = True,
) -> int:
    """Put a checkpoint's values, and what the optimizer knew of them, into what this rank holds. Collective.

    Returns: bytes that this rank has read. Raises UserError on every rank: other parameters than the model's, a
    damaged file, an optimizer of another kind.
    """
    manifest = checkpoint.manifest
    _check_parameters(checkpoint, parameters)
    kinds = [VALUE, *(manifest.moments if with_moments else [])]
    if with_moments:
        _check_optimizer(checkpoint, partition)
        steps = {parameter.name: parameter.steps for parameter in manifest.parameters}
        partition.prepare(manifest.moments, steps, manifest.learning_rates)
    count = ranks.agree(lambda: _read(checkpoint, partition, kinds))
    partition.publish()
    return count


def _read(checkpoint: Checkpoint, partition: Partition, kinds: list[str]) -> int:
    manifest, fragments = checkpoint.manifest, partition.fragments
    begins = offsets(manifest.sizes())
    wanted = [(begins[f.name] + f.start, begins[f.name] + f.start + f.count) for f in fragments]
    starts = list(accumulate((f.count for f in fragments), initial=0))
    reads = sorted(plan_reads(wanted, [shard.spans for shard in manifest.shards]))
    bytes_read = 0
    for number, shard in enumerate(manifest.shards):
        mine = [read for read in reads if read.shard == number]
        if not mine:
            continue
        with TensorFile(checkpoint.directory / shard.name, shard.file) as file:
            for kind in kinds:
                for read in mine:
                    index = bisect.bisect_right(starts, read.into) - 1
                    at = read.into - starts[index]
                    file.copy(kind, read.at, partition.view(fragments[index], kind)[at : at + read.count])
            bytes_read += file.bytes_read
    return bytes_read


def _check_parameters(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    saved = {parameter.name: tuple(parameter.shape) for parameter in checkpoint.manifest.parameters}
    here = {name: tuple(full_shape(parameter)) for name, parameter in parameters.items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            in_model, in_file = (f"{list(s)}" if s else "nothing" for s in (here.get(name), saved.get(name)))
            raise UserError(
                f"{checkpoint.directory}: of another model or selection: of '{name}' it holds {in_file}, this run "
                f"trains {in_model}"
            )


def _check_optimizer(checkpoint: Checkpoint, partition: Partition) -> None:
    saved, here = checkpoint.manifest.optimizer, type(partition.optimizer).__name__
    if saved != here and not ("adam" in saved.lower() and "adam" in here.lower()):
        raise UserError(f"training.optim: {checkpoint.directory} was saved by {saved}, this run's optimizer is {here}")


def read_random_states(checkpoint: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    """The states that `rank` saved. Raises UserError."""
    shard = checkpoint.manifest.shards[rank]
    with TensorFile(checkpoint.directory / shard.name, shard.file) as file:
        return {
            name.removeprefix(RNG_PREFIX): file.tensor(name) for name in file.names() if name.startswith(RNG_PREFIX)
        }
