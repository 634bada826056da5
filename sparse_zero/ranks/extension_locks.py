"""Locks that killed processes left on C++ operators (torch extensions) compiled at first use: DeepSpeed's and ours.

torch's loader locks an operator with a file, even while it only loads a finished one. If a rank is killed meanwhile,
the file remains, and every later process waits for it forever.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

STALE_SECONDS = 15 * 60
"""Age from which a lock counts as abandoned even if its holder may be invisible here. No operator compiles longer."""

INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""The Linux PID namespace in which the processes of all containers are visible."""


def extension_directories() -> Iterator[Path]:
    """The directories of all operators that were built or are being built."""
    # TORCH_EXTENSIONS_DIR contains the operators; the default has one directory per Python version and accelerator.
    return _user_directory().glob("*/") if _user_directory() else _default_directory().glob("*/*/")


def build_directory(name: str) -> Path:
    """The directory for building an operator that depends on neither the Python version nor the accelerator."""
    return (_user_directory() or _default_directory() / "sparse_zero") / name


def _user_directory() -> Path | None:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else None


def _default_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"


def remove_abandoned_locks() -> None:
    """Remove the locks whose holders have ended.

    Call it before the rendezvous: later, one rank may hold a lock that another rank has just found abandoned.
    """
    for directory in extension_directories():
        lock = directory / "lock"
        with contextlib.suppress(OSError):  # another rank was faster, or the file belongs to another user
            if _is_abandoned(lock):
                lock.unlink()
                logger.warning("removed the abandoned lock %s: the process that created it no longer exists", lock)


def _is_abandoned(lock: Path) -> bool:
    found = lock.stat()
    if found.st_uid != os.getuid() or _is_open_here(lock):
        return False
    if _may_be_held_elsewhere(found) and time.time() - found.st_mtime < STALE_SECONDS:
        return False
    # During the search, the lock may have passed to a process that did not have it when that process was examined
    now = lock.stat()
    return (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns)


def _may_be_held_elsewhere(lock: os.stat_result) -> bool:
    """Whether a process that is not visible here, on another host or in another container, may hold the lock."""
    # File systems that are no local disk (NFS, Lustre, but overlays as well) have major number 0
    on_other_hosts = os.major(lock.st_dev) == 0
    return on_other_hosts or os.readlink("/proc/self/ns/pid") != INITIAL_PID_NAMESPACE


def _is_open_here(path: Path) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(Path(file.path) == path.resolve() for file in process.open_files()):
                return True
    return False
