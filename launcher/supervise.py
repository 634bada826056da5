"""Supervises a run: starts its ranks, and restarts them after a failure, up to launch.max_restarts times."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from launcher import processes
from launcher.processes import RunExit
from launcher.ways import launchers
from sparse_zero.checkpoint.listing import MANIFEST_NAME, list_checkpoints
from sparse_zero.ranks.stop_signals import STOPPED
from sparse_zero.ranks.watchdog import Watchdog
from sparse_zero.ranks.watchdog_client import print_outcome
from sparse_zero.recipe.recipe import Recipe

_FINAL = (0, 2, STOPPED)
"""Exit statuses that a restart would not change."""


def run(recipe: Recipe, words: Sequence[str], stdout: TextIO | None = None) -> RunExit:
    """Start `python -m words[0] words[1:]` on all ranks of a recipe, and wait until the last attempt ends.

    Args:
        recipe: defines how to start the ranks, and how often to restart them.
        words: the module that every rank runs, and its arguments.
        stdout: for the output of the ranks; None: this process's own.

    Returns: how the last attempt exited.

    Raises UserError: the ranks cannot be started.
    """
    output = Path(str(recipe.training["output_dir"]))
    names = hosts = launchers.host_names(recipe)
    before = set(_saved(output))
    for restart in range(1, recipe.launch.max_restarts + 2):
        result = _attempt(recipe, words, hosts, stdout)
        if result.stopped or result.status in _FINAL or restart > recipe.launch.max_restarts:
            break
        hosts = _hosts_for_restart(recipe, names)
        if names and not hosts:
            break
        if not before.issuperset(_saved(output)[-1:]):
            words = _with_resume(words)
        on = f" on {', '.join(hosts)}" if hosts else ""
        _print(f"restarting{on} (restart {restart} of {recipe.launch.max_restarts})")
    newest = _newest_complete(output)
    if result.status not in _FINAL and newest is not None:
        _print(f"the run has not finished; resume it from {newest} with --resume")
    return result


def _attempt(recipe: Recipe, words: Sequence[str], hosts: Sequence[str], stdout: TextIO | None) -> RunExit:
    launch = recipe.launch
    watchdog = Watchdog(print_outcome, launch.silence_seconds, launchers.watchdog_address(recipe, hosts))
    try:
        command = launchers.ranks_command(recipe, words, str(watchdog.address), hosts)
        watchdog.on_last_join = command.remove_private_file
        # Outside of a Slurm job, srun may wait in the queue for days.
        if hosts or launch.launcher != "slurm":
            watchdog.expect(command.world_size, launch.rendezvous_seconds)
        return processes.run(command, watchdog, stdout, launch.grace_seconds)
    finally:
        watchdog.close()


def _hosts_for_restart(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The hosts in `names` that can be reached; none if there are too few."""
    if not names:
        return []
    # Slurm frees a step's resources a moment after its last process has ended.
    time.sleep(1)
    problems = launchers.unreachable(recipe, names)
    reachable = [name for name in names if name not in problems]
    needed = recipe.launch.min_nodes or len(names)
    if len(reachable) >= needed:
        return reachable
    lost = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    reason = "launch.min_nodes" if recipe.launch.min_nodes else "all of them, as launch.min_nodes is not set"
    _print(
        f"not restarting: {len(reachable)} of {len(names)} hosts can be reached, {needed} needed ({reason}): {lost}"
    )
    return []


def _saved(output: Path) -> list[tuple[str, int, int]]:
    """What tells each complete checkpoint of a run from any other, in the order of their steps."""
    found = []
    for checkpoint in list_checkpoints(output):
        with contextlib.suppress(OSError):
            facts = (checkpoint / MANIFEST_NAME).stat()
            found.append((checkpoint.name, facts.st_ino, facts.st_mtime_ns))
    return found


def _with_resume(words: Sequence[str]) -> list[str]:
    """`words` for a run that has saved a checkpoint: it resumes from that, not again from what was asked for."""
    return [word for word in words if not word.startswith(("--resume", "--reset"))] + ["--resume=auto"]


def _newest_complete(output: Path) -> Path | None:
    found = _saved(output)
    return output / found[-1][0].removesuffix(".replaced") if found else None


def _print(message: str) -> None:
    print(f"sparse-zero: {message}", file=sys.stderr, flush=True)
