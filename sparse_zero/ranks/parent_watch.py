"""Notices that the launcher which started this rank has ended: its other ranks and this one are then to stop.

A launcher that is killed tells nobody. The kernel gives its ranks another parent, so a rank compares its parent's
process id from time to time. DeepSpeed's launcher does not notice when the runner that started it is killed, so its
ranks also compare the launcher's own parent.

PR_SET_PDEATHSIG would not do: it also fires when only the thread ends that started the rank, it says nothing if the
launcher has ended before the call, and its signal cannot be told from a scheduler's.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import psutil

from sparse_zero.ranks.watchdog_client import WATCH_VARIABLE

POLL_SECONDS = 0.5

_DEEPSPEED = "CROSS_RANK"
_LAUNCHERS = (
    WATCH_VARIABLE,
    "TORCHELASTIC_RUN_ID",
    _DEEPSPEED,
    "OMPI_COMM_WORLD_RANK",
    "MPI_LOCALRANKID",
    "SLURM_STEP_ID",
)
"""The variables of launchers that outlive their ranks. The shell from which a rank was started by hand need not."""


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that waits for its ranks started this process, according to its environment."""
    return any(environ.get(name) for name in _LAUNCHERS)


def watch_parent(parent: int, on_end: Callable[[int], None], environ: Mapping[str, str]) -> None:
    """Call `on_end` once, in a thread of its own, with the process id of the launcher that has ended.

    Args:
        parent: `os.getppid()` of this process, as early as possible.
        environ: the environment variables of this process.
    """
    is_deepspeed = bool(environ.get(_DEEPSPEED))
    grandparent = _parent_of(parent) if is_deepspeed else None

    def watch() -> None:
        while True:
            if os.getppid() != parent:
                return on_end(parent)
            # None: the launcher has just ended, or belongs to another user.
            if is_deepspeed and grandparent is not None and _parent_of(parent) not in (grandparent, None):
                return on_end(grandparent)
            time.sleep(POLL_SECONDS)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _parent_of(process: int) -> int | None:
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None
