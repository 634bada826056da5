"""One log file per rank: its output, warnings and traceback, and the Python stack if it crashes.

Does not import torch: a rank opens its log before anything else can fail.
"""

import contextlib
import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TextIO

from sparse_zero.errors import UserError

_HEADER = "=== attempt "


def open_rank_log(directory: Path, rank: int, world_size: int) -> Path:
    """Send this rank's output to DIRECTORY/rank-00003.log from now on, after the output of earlier attempts.

    On rank 0 the console still shows all output, and the file gets a copy of what Python writes to sys.stdout and
    sys.stderr, except progress bars. On all other ranks the file replaces the file descriptors 1 and 2, so that it
    also gets the output of C libraries and child processes. On a crash (such as SIGSEGV), the Python stacks of all
    threads are written to the file. Each line is written at once, so that os._exit loses nothing. The file stays open
    until the process ends. Call this function once per process.

    Returns:
        The path of the file.

    Raises:
        UserError: the file cannot be written.
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
        ignore_lost_console()
        for stream in (sys.stdout, sys.stderr):
            _tee(stream, descriptor)
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


def _tee(stream: TextIO, descriptor: int) -> None:
    # Only its method is replaced: existing logging handlers refer to the stream, and others read its encoding.
    to_console, to_file = stream.write, _LogFile(descriptor)

    def write(text: str) -> int:
        to_file.write(text)
        return to_console(text)

    stream.write = write


def ignore_lost_console() -> None:
    """Let sys.stdout and sys.stderr drop what they get after the process that reads them has ended.

    A launcher that was killed must not stop the training with a BrokenPipeError, nor the save of a checkpoint.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.write = _without_broken_pipe(stream, stream.write)
        stream.flush = _without_broken_pipe(stream, stream.flush)


def _without_broken_pipe(stream: TextIO, method: Callable[..., int | None]) -> Callable[..., int | None]:
    def call(*text: str) -> int | None:
        try:
            return method(*text)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            return sum(map(len, text))

    return call


class _LogFile:
    """Writes the text of a stream to a file, without progress bars."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_line_empty = True

    def write(self, text: str) -> None:
        kept = without_progress_bars(text, self._is_line_empty)
        if kept:
            self._is_line_empty = kept.endswith("\n")
            # A full disk must not stop the training.
            with contextlib.suppress(OSError):
                os.write(self._descriptor, kept.encode(errors="backslashreplace"))


def without_progress_bars(text: str, is_line_empty: bool) -> str:
    """The part of a write that belongs in a log file: all of it, or nothing if it draws a progress bar.

    A progress bar starts with a carriage return. A bar below another one first moves down with a line feed, and back
    up with an escape sequence. Therefore, a line feed on an empty line is left out as well.

    Args:
        text: the text of one write.
        is_line_empty: whether the current line of the log is empty.
    """
    if text.startswith("\r") and not text.startswith("\r\n"):
        return ""
    if is_line_empty and not text.replace("\x1b[A", "").strip("\r\n"):
        return ""
    return text
