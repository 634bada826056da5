"""Loads a checkpoint on all ranks together. Each rank reads only what it needs from the shards."""

import bisect
from collections.abc import Mapping
from itertools import accumulate, groupby

import torch
from torch import nn

from sparse_zero.checkpoint import random_states
from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.shards import TensorFile
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.zero.parameters import full_shape
from sparse_zero.zero.partitions import VALUE, Partition
from sparse_zero.zero.resharding import Read, parameter_offsets, plan_reads


def load_partition(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    partition: Partition,
    ranks: Ranks,
    with_moments: bool = True,
) -> int:
    """Load a checkpoint's values and moments into this rank's partition. A collective call. The number of ranks and
    the ZeRO stage may differ from those that saved the checkpoint.

    Args:
        checkpoint: what to load.
        parameters: the trained parameters by name.
        partition: this rank's part of them.
        ranks: all ranks.
        with_moments: also restore the optimizer's moments, steps and learning rates.

    Returns: the number of bytes that this rank has read.

    Raises UserError on every rank: the checkpoint has other parameters or another type of optimizer, or a file is
        damaged.
    """
    manifest = checkpoint.manifest
    _check_parameters(checkpoint, parameters)
    kinds = [VALUE, *(manifest.moments if with_moments else [])]
    if with_moments:
        _check_optimizer(checkpoint, partition)
    # Nothing changes before all that is read was verified
    ranks.run_together(lambda: _verify(checkpoint, partition, kinds))
    if with_moments:
        steps = {parameter.name: parameter.steps for parameter in manifest.parameters}
        partition.initialize_state(manifest.moments, steps, manifest.learning_rates)
    count = ranks.run_together(lambda: _read(checkpoint, partition, kinds))
    partition.update_model()
    return count


def _plan(checkpoint: Checkpoint, partition: Partition) -> list[Read]:
    """What this rank reads, in the order of the shards."""
    begins = parameter_offsets(checkpoint.manifest.sizes())
    wanted = [(begins[f.name] + f.start, begins[f.name] + f.start + f.count) for f in partition.fragments]
    return sorted(plan_reads(wanted, [shard.spans for shard in checkpoint.manifest.shards]))


def _verify(checkpoint: Checkpoint, partition: Partition, kinds: list[str]) -> None:
    """Check the tensors that this rank reads, and the digests of the blocks of which they consist."""
    for number, reads in groupby(_plan(checkpoint, partition), key=lambda read: read.shard):
        shard, mine = checkpoint.manifest.shards[number], [*reads]
        count = sum(end - start for start, end in shard.spans)
        with TensorFile(checkpoint.directory / shard.name, shard.file) as file:
            for kind in kinds:
                file.check(kind, (count,), torch.float32)
                for read in mine:
                    file.verify(kind, read.shard_offset, read.count)


def _read(checkpoint: Checkpoint, partition: Partition, kinds: list[str]) -> int:
    fragments = partition.fragments
    starts = list(accumulate((f.count for f in fragments), initial=0))
    bytes_read = 0
    for number, reads in groupby(_plan(checkpoint, partition), key=lambda read: read.shard):
        shard, mine = checkpoint.manifest.shards[number], [*reads]
        with TensorFile(checkpoint.directory / shard.name, shard.file) as file:
            for kind in kinds:
                for read in mine:
                    index = bisect.bisect_right(starts, read.target_offset) - 1
                    at = read.target_offset - starts[index]
                    file.copy(kind, read.shard_offset, partition.view(fragments[index], kind)[at : at + read.count])
            bytes_read += file.bytes_read
    return bytes_read


def _check_parameters(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    saved = {parameter.name: tuple(parameter.shape) for parameter in checkpoint.manifest.parameters}
    here = {name: tuple(full_shape(parameter)) for name, parameter in parameters.items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            in_model, in_file = (
                f"has it with shape {list(s)}" if s else "does not have it" for s in (here.get(name), saved.get(name))
            )
            raise UserError(
                f"{checkpoint.directory}: from a run with another model or selection: the trained parameters differ "
                f"in '{name}': the checkpoint {in_file}, this run {in_model}"
            )


def _check_optimizer(checkpoint: Checkpoint, partition: Partition) -> None:
    saved, here = checkpoint.manifest.optimizer, type(partition.optimizer).__name__
    if saved != here and not ("adam" in saved.lower() and "adam" in here.lower()):
        raise UserError(
            f"training.optim: {checkpoint.directory} was saved with {saved}, but the optimizer of this run is {here}; "
            "restore it, or begin without its moments with --reset optimizer"
        )
    if "adam" in here.lower():
        amsgrad = any(group.get("amsgrad") for group in partition.optimizer.param_groups)
        needed = {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])}
        if (moments := {*checkpoint.manifest.moments}) != needed:
            raise UserError(
                f"training.optim: {checkpoint.directory} has the moments {sorted(moments)}, but the optimizer of this "
                f"run has {sorted(needed)}"
            )


def read_random_states(checkpoint: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    """The random states that `rank` saved; see `random_states.capture`. Raises UserError: the shard is damaged."""
    shard = checkpoint.manifest.shards[rank]
    with TensorFile(checkpoint.directory / shard.name, shard.file) as file:
        names = [name for name in file.names() if name.startswith(random_states.PREFIX)]
        states = {name.removeprefix(random_states.PREFIX): file.tensor(name) for name in names}
    random_states.check(states, file.path)
    return states
