"""One run for each output directory: a lock of the operating system, which ends with the process that holds it."""

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

from sparse_zero.checkpoint.directory import clean
from sparse_zero.errors import UserError
from sparse_zero.ranks.agreement import Ranks

LOCK_NAME = ".lock"
_PATIENCE_SECONDS = 5.0
"""Ranks of a run that was killed a moment ago may still be ending."""


@contextlib.contextmanager
def locked(output: Path, ranks: Ranks) -> Iterator[None]:
    """Hold a run's output directory, and remove from it what interrupted saves have left. Collective.

    Raises UserError on every rank: another run holds it; it cannot be written to.
    """
    file = ranks.agree(lambda: _lock(output) if ranks.rank == 0 else None)
    try:
        ranks.agree(lambda: clean(output) if ranks.rank == 0 else None)
        yield
    finally:
        if file is not None:
            file.close()


def _lock(output: Path) -> IO[str]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK_NAME).open("a+")
    except OSError as error:
        raise UserError(f"training.output_dir: {output}: cannot be written to ({error.strerror})") from None
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _try(file):
        if time.monotonic() > deadline:
            file.seek(0)
            other = _describe(file.read())
            file.close()
            raise UserError(
                f"training.output_dir: {output} is in use by {other}; give this run another directory, or end that run"
            )
        time.sleep(0.2)
    file.seek(0)
    file.truncate()
    json.dump({"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}, file)
    file.flush()
    return file


def _try(file: IO[str]) -> bool:
    try:
        # lockf, not flock: a rank's forked helpers must not hold on to it.
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
        job = f" of job {other['job']}" if other["job"] else ""
        return f"process {other['process']} on {other['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another run"
