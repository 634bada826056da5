"""A lock on the output directory of a run. The operating system releases it when the process ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparse_zero.checkpoint.branches import finish_leaving
from sparse_zero.checkpoint.directory import remove_leftovers
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks

LOCK_NAME = ".lock"
_TIMEOUT_SECONDS = 5.0
"""The ranks of a run that was just killed may need a moment to end."""


@contextlib.contextmanager
def locked(output: Path, ranks: Ranks) -> Iterator[None]:
    """Lock a run's output directory for the duration of the block, and tidy up what interrupted saves and moves have
    left. A collective call; rank 0 holds the lock.

    Raises UserError on every rank: another run has locked the directory, or it cannot be written to.
    """
    file = ranks.run_together(lambda: _lock(output) if ranks.rank == 0 else None)
    try:
        ranks.on_first(lambda: _tidy(output))
        yield
    finally:
        if file is not None:
            file.close()


def _tidy(output: Path) -> None:
    remove_leftovers(output)
    finish_leaving(output)


def _lock(output: Path) -> IO[str]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK_NAME).open("a+")
    except OSError as error:
        raise UserError(f"training.output_dir: {output}: cannot be written to ({error.strerror})") from None
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not _try_to_lock(file):
        if time.monotonic() > deadline:
            file.seek(0)
            other = _describe(file.read())
            file.close()
            raise UserError(
                f"training.output_dir: {output} is in use by {other}; use another directory, or end that run"
            )
        time.sleep(0.2)
    file.seek(0)
    file.truncate()
    json.dump({"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}, file)
    file.flush()
    return file


def _try_to_lock(file: IO[str]) -> bool:
    try:
        # lockf, not flock: forked child processes must not keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
    return True


def _describe(text: str) -> str:
    try:
        other = json.loads(text)
        job = f" (Slurm job {other['job']})" if other["job"] else ""
        return f"process {other['process']} on {other['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another run"
