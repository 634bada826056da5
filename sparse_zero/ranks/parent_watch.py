"""Notices that the launcher which started this rank has ended: its other ranks and this one are then to stop.

A launcher that is killed tells nobody. The kernel gives its ranks another parent, so a rank compares its parent's
process id from time to time. PR_SET_PDEATHSIG would not do: it also fires when only the thread ends that started the
rank, it says nothing if the launcher has ended before the call, and its signal cannot be told from a scheduler's.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

from sparse_zero.ranks.watchdog_client import WATCH_VARIABLE

POLL_SECONDS = 0.5

_LAUNCHERS = (
    WATCH_VARIABLE,
    "TORCHELASTIC_RUN_ID",
    "CROSS_RANK",  # DeepSpeed
    "OMPI_COMM_WORLD_RANK",
    "MPI_LOCALRANKID",
    "SLURM_STEP_ID",
)
"""The variables of launchers that outlive their ranks. The shell from which a rank was started by hand need not."""


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that waits for its ranks started this process, according to its environment."""
    return any(environ.get(name) for name in _LAUNCHERS)


def watch_parent(parent: int, on_end: Callable[[int], None]) -> None:
    """Call `on_end(parent)` once, in a thread of its own, when this process has another parent than `parent`.

    Args:
        parent: `os.getppid()` of this process, as early as possible.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        on_end(parent)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
