"""A run from its first start to its last: its ranks watched, and started again where they may be."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from launcher import processes, ways
from launcher.processes import Ending
from sparse_zero.errors import UserError
from sparse_zero.membership import announce
from sparse_zero.recipe import Recipe
from sparse_zero.roll_call import RollCall
from sparse_zero.stopping import STOPPED

_FINAL = (0, 2, STOPPED)
"""Exit statuses that another start would not change."""
_COMPLETE = re.compile(r"checkpoint-\d+(\.replaced)?")
"""Names of checkpoints, as against what an interrupted save leaves behind."""


def run(recipe: Recipe, words: Sequence[str], stdout: TextIO | None = None) -> Ending:
    """Start `python -m words[0] words[1:]` on all ranks of a recipe and wait for the end, restarts included.

    Raises UserError: the ranks cannot be started.
    """
    names = ways.host_names(recipe)
    left = None
    restarts = 0
    while True:
        ending = _attempt(recipe, words, names if left is None else left, left, stdout)
        if ending.stopped or ending.status in _FINAL or restarts == recipe.launch.max_restarts:
            return ending
        restarts += 1
        left = _hosts_left(recipe, names)
        if left is None:
            return ending
        words = _resumed(words, Path(str(recipe.training["output_dir"])))
        on = f" on {', '.join(left)}" if left else ""
        _say(f"starting again{on} (restart {restarts} of {recipe.launch.max_restarts})")
        left = left or None


def _attempt(
    recipe: Recipe, words: Sequence[str], names: Sequence[str], left: Sequence[str] | None, stdout: TextIO | None
) -> Ending:
    launch = recipe.launch
    planned = ways.ranks_command(recipe, words, left=left)
    # A job of srun's own may wait in the queue for days.
    queues = launch.launcher == "slurm" and not names
    roll = RollCall(
        announce,
        launch.silence_seconds,
        arrival_seconds=None if queues else launch.rendezvous_seconds,
        host=ways.watching_address(recipe, names),
        world_size=planned.world_size,
    )
    try:
        command = ways.ranks_command(recipe, words, watch=str(roll.address), left=left)
        command.write_files()
        return processes.run(command, roll, stdout, launch.grace_seconds)
    finally:
        roll.close()


def _hosts_left(recipe: Recipe, names: Sequence[str]) -> list[str] | None:
    """Of `names`, those to start again on; None: too few answer."""
    if not names:
        return []
    # Slurm lets go of a step's resources a moment after its last process.
    time.sleep(1)
    problems = ways.unreachable(recipe, names)
    left = [name for name in names if name not in problems]
    fewest = recipe.launch.min_nodes or len(names)
    if len(left) >= fewest:
        return left
    lost = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    wanted = "launch.min_nodes" if recipe.launch.min_nodes else "all of them; launch.min_nodes would allow fewer"
    _say(f"not starting again on {len(left)} of {len(names)} hosts, {fewest} are needed ({wanted}): {lost}")
    return None


def _resumed(words: Sequence[str], output: Path) -> list[str]:
    """The same, going on from the run's newest checkpoint; where it has none, from what it was told to go on from."""
    written = output.glob("checkpoint-*/manifest.json")
    if not any(_COMPLETE.fullmatch(path.parent.name) for path in written):
        return list(words)
    return [word for word in words if not word.startswith("--resume")] + ["--resume=auto"]


def _say(message: str) -> None:
    print(f"sparse-zero: {message}", file=sys.stderr, flush=True)


def check_hosts(recipe: Recipe) -> None:
    """Raises UserError: a host of the hostfile that ranks cannot be started on."""
    names = ways.host_names(recipe) if recipe.launch.hostfile else []
    problems = ways.unreachable(recipe, names)
    if problems:
        lost = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(f"launch.hostfile: {len(problems)} of {len(names)} hosts cannot be reached: {lost}")
