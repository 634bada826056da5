"""One log file for each rank: what it prints, its warnings, its traceback, and where it stood when it crashed.

Imports no torch: a rank opens its log before anything else can fail.
"""

import contextlib
import faulthandler
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import TextIO

from sparse_zero.errors import UserError

_HEADER = "=== attempt "


def open_rank_log(directory: Path, rank: int, world_size: int) -> Path:
    """From now on what this rank prints goes to DIRECTORY/rank-00003.log, behind what earlier attempts wrote.

    Of rank 0 the console stays as it is, and the file gets a copy of what Python writes to sys.stdout and sys.stderr,
    but for progress bars. Of any other rank the file takes the place of the file descriptors 1 and 2, so that what C
    libraries and child processes print lands there too. A crash (SIGSEGV and its like) leaves every thread's Python
    stack in the file. Each line is written at once, so that os._exit loses none; the file is open as long as the
    process lives.

    Returns: the file. Raises UserError: it cannot be written. Call it once in a process.
    """
    path = directory / f"rank-{rank:05d}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        attempt = 1 + _count_attempts(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        header = f"{_HEADER}{attempt}, {datetime.now().astimezone().isoformat(timespec='seconds')}, rank {rank} of "
        header += f"{world_size}, host {socket.gethostname()}, process {os.getpid()}\n"
        os.write(descriptor, header.encode())
    except OSError as error:
        raise UserError(f"training.output_dir: {path}: cannot be written to ({error.strerror})") from None
    faulthandler.enable(descriptor)
    if rank == 0:
        for stream in (sys.stdout, sys.stderr):
            _copy(stream, descriptor)
    else:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(descriptor, number)
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    return path


def _count_attempts(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(line.startswith(_HEADER.encode()) for line in file)


def _copy(stream: TextIO, descriptor: int) -> None:
    # The stream itself stays: logging handlers that were made earlier hold it, and others ask it for its encoding.
    to_console, to_file = stream.write, _Copy(descriptor)

    def write(text: str) -> int:
        to_file.write(text)
        return to_console(text)

    stream.write = write


class _Copy:
    """Writes a stream's text to a file without what redraws a progress bar."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_line_empty = True

    def write(self, text: str) -> None:
        kept = without_redraws(text, self._is_line_empty)
        if kept:
            self._is_line_empty = kept.endswith("\n")
            # A full disk must not end the training.
            with contextlib.suppress(OSError):
                os.write(self._descriptor, kept.encode(errors="backslashreplace"))


def without_redraws(text: str, is_line_empty: bool) -> str:
    """What of one write belongs into a file.

    A bar returns to the start of its line before it draws; the bar below another one moves there with a line feed, and
    back up with an escape sequence. Therefore a line feed on a line that has no text is left out too.
    """
    if text.startswith("\r") and not text.startswith("\r\n"):
        return ""
    if is_line_empty and not text.replace("\x1b[A", "").strip("\r\n"):
        return ""
    return text
