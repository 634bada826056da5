"""Stands in for sparse_zero.training.run: each step is a sum over all ranks, and its checkpoints hold nothing.

Everything else of a rank is real: its launcher, log, signals, watchdog, process group and end. It starts in one
second, where the training imports for four more.
"""

import json
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_zero.checkpoint.listing import MANIFEST_NAME, checkpoint_path, list_checkpoints
from sparse_zero.ranks.stop_signals import Stopped, StopRequest
from sparse_zero.recipe.recipe import Recipe


def limit_output(is_first_of_host: bool) -> None:
    pass


def destroy_process_group() -> None:
    dist.destroy_process_group()


def train(recipe: Recipe, path: str, *, stop: StopRequest, resume: str | None, **options: Any) -> None:
    """Ends as the training does: after `max_steps` steps with results.json, or with Stopped after the step in which a
    rank is asked to stop. A file named `enough` in the output directory makes its step the last one.
    """
    output, rank, last = Path(str(recipe.training["output_dir"])), dist.get_rank(), recipe.training["max_steps"]
    saved = list_checkpoints(output) if resume else []
    first = 1 + max((int(checkpoint.name.partition("-")[2]) for checkpoint in saved), default=0)
    sums = []
    with stop.deferred():
        for step in range(first, last + 1):
            state = torch.tensor([(rank + 1) * step, stop.is_raised, (output / "enough").exists()])
            dist.all_reduce(state)
            total, is_stopped, is_enough = state.tolist()
            sums.append(total)
            if rank == 0:
                print(f"step {step}/{last}  sum {total}", flush=True)
            if is_stopped or step % recipe.training["save_steps"] == 0:
                _save(checkpoint_path(output, step))
            if is_stopped:
                raise Stopped(step, str(checkpoint_path(output, step)))
            if is_enough:
                break
            time.sleep(0.01)
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    if rank == 0:
        results = {"world_size": len(hosts), "hosts": hosts, "first_step": first, "sums": sums}
        results["training"] = recipe.training
        (output / "results.json").write_text(json.dumps(results))


def _save(directory: Path) -> None:
    if dist.get_rank() == 0:
        written = directory.with_name(f"{directory.name}.tmp-0")
        written.mkdir(parents=True)
        (written / MANIFEST_NAME).write_text("{}")
        written.rename(directory)
    dist.barrier()
