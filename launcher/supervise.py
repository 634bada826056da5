"""A run from its first start to its last: its ranks watched, and started again where they may be."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from launcher import processes
from launcher.processes import Ending
from launcher.ways import launchers
from sparse_zero.ranks.stop_signals import STOPPED
from sparse_zero.ranks.watchdog import Watchdog
from sparse_zero.ranks.watchdog_client import announce
from sparse_zero.recipe.recipe import Recipe

_FINAL = (0, 2, STOPPED)
"""Exit statuses that another start would not change."""


def run(recipe: Recipe, words: Sequence[str], stdout: TextIO | None = None) -> Ending:
    """Start `python -m words[0] words[1:]` on all ranks of a recipe and wait for the end, restarts included.

    Raises UserError: the ranks cannot be started.
    """
    names = hosts = launchers.host_names(recipe)
    for restart in range(1, recipe.launch.max_restarts + 2):
        ending = _attempt(recipe, words, hosts, stdout)
        if ending.stopped or ending.status in _FINAL or restart > recipe.launch.max_restarts:
            break
        hosts = _hosts_left(recipe, names)
        if names and not hosts:
            break
        words = _resumed(words, Path(str(recipe.training["output_dir"])))
        on = f" on {', '.join(hosts)}" if hosts else ""
        _say(f"starting again{on} (restart {restart} of {recipe.launch.max_restarts})")
    return ending


def _attempt(recipe: Recipe, words: Sequence[str], hosts: Sequence[str], stdout: TextIO | None) -> Ending:
    launch = recipe.launch
    watchdog = Watchdog(announce, launch.silence_seconds, launchers.watching_address(recipe, hosts))
    try:
        command = launchers.ranks_command(recipe, words, str(watchdog.address), hosts)
        command.write_files()
        # A job of srun's own may wait in the queue for days.
        if hosts or launch.launcher != "slurm":
            watchdog.expect(command.world_size, launch.rendezvous_seconds)
        return processes.run(command, watchdog, stdout, launch.grace_seconds)
    finally:
        watchdog.close()


def _hosts_left(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Of `names`, those to start again on; none where too few answer."""
    if not names:
        return []
    # Slurm lets go of a step's resources a moment after its last process.
    time.sleep(1)
    problems = launchers.unreachable(recipe, names)
    left = [name for name in names if name not in problems]
    fewest = recipe.launch.min_nodes or len(names)
    if len(left) >= fewest:
        return left
    lost = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    wanted = "launch.min_nodes" if recipe.launch.min_nodes else "all of them; launch.min_nodes would allow fewer"
    _say(f"not starting again on {len(left)} of {len(names)} hosts, {fewest} are needed ({wanted}): {lost}")
    return []


def _resumed(words: Sequence[str], output: Path) -> list[str]:
    """The same, going on from the run's newest checkpoint; where it has none, from what it was told to go on from."""
    from sparse_zero.checkpoint.directory import MANIFEST_NAME, numbered

    if not any((checkpoint / MANIFEST_NAME).is_file() for checkpoint in numbered(output)):
        return list(words)
    return [word for word in words if not word.startswith("--resume")] + ["--resume=auto"]


def _say(message: str) -> None:
    print(f"sparse-zero: {message}", file=sys.stderr, flush=True)
