"""Operators that are compiled at first use, DeepSpeed's and ours, and the locks that killed processes have left there.

torch's loader locks an operator by a file that exists, also for the moment in which a finished one is loaded. A rank
that is killed then leaves the file, and every later process waits for ever.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

UNSEEN_SECONDS = 15 * 60
"""Longer than any operator compiles: so old is a lock that a process may hold whom nobody here sees."""

FIRST_NAMESPACE = "pid:[4026531836]"
"""From where Linux shows the processes of all containers too."""


def directories() -> Iterator[Path]:
    """Of the operators that were built, or are being built."""
    # The user's own directory holds the operators, the default one has a directory for each Python and accelerator.
    return _own().glob("*/") if _own() else _default().glob("*/*/")


def directory_of(name: str) -> Path:
    """Where to build an operator that no Python and no accelerator has a part in."""
    return (_own() or _default() / "sparse_zero") / name


def _own() -> Path | None:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else None


def _default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"


def remove_abandoned_locks() -> None:
    """Call it before the ranks meet: afterwards one of them may hold a lock that another has just seen abandoned."""
    for directory in directories():
        lock = directory / "lock"
        with contextlib.suppress(OSError):  # another rank was faster, or it is another user's
            if _is_abandoned(lock):
                lock.unlink()
                logger.warning("removed %s: the process that held it has ended without a word", lock)


def _is_abandoned(lock: Path) -> bool:
    found = lock.stat()
    if found.st_uid != os.getuid() or _is_open_here(lock):
        return False
    if _may_be_held_unseen(found) and time.time() - found.st_mtime < UNSEEN_SECONDS:
        return False
    # While the processes were looked at, the lock may have passed on to one that had none when its turn came
    now = lock.stat()
    return (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns)


def _may_be_held_unseen(lock: os.stat_result) -> bool:
    # File systems without a disk of this machine (NFS, Lustre, but also overlays) have no major number
    on_other_hosts = os.major(lock.st_dev) == 0
    return on_other_hosts or os.readlink("/proc/self/ns/pid") != FIRST_NAMESPACE


def _is_open_here(path: Path) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(Path(file.path) == path.resolve() for file in process.open_files()):
                return True
    return False
