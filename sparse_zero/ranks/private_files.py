"""Files that only their owner can read, which bring a secret of a run to its processes on other hosts.

The directory is one that the hosts share. Each file belongs to one process, which removes it. Does not import torch.
"""

import contextlib
import os
import socket
from pathlib import Path

import psutil

from sparse_zero.errors import UserError


def own_file(directory: Path, name: str) -> Path:
    """The path of this process's file of that name: `NAME.HOST.PROCESS`."""
    return directory.absolute() / f"{name}.{socket.gethostname()}.{os.getpid()}"


def write(file: Path, text: str) -> None:
    """Write a file of mode 0600, and remove those of processes that were killed before they could.

    Args:
        file: of `own_file`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(file)
        # A new file: an old one may have another mode, or be a link.
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as opened:
            opened.write(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


def remove(file: Path) -> None:
    """Remove a file, if it is there, and its directory, if that is empty then."""
    with contextlib.suppress(OSError):
        file.unlink()
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _remove_abandoned(file: Path) -> None:
    """Remove the files of that name whose process on this host has ended."""
    for other in file.parent.glob(f"{file.name.partition('.')[0]}.*"):
        host, _, process = other.name.partition(".")[2].rpartition(".")
        if host == socket.gethostname() and process.isdigit() and not psutil.pid_exists(int(process)):
            # Its directory stays.
            with contextlib.suppress(OSError):
                other.unlink()
