"""Settings of the watchdog's TCP connections, and what their errors mean. Does not import torch."""

import errno
import resource
import socket

_MAX_OPEN_FILES = 1 << 16


def enable_keepalive(connection: socket.socket, silence_seconds: float) -> None:
    """Make the kernel close a connection whose other host does not answer for `silence_seconds`."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 4
    options = {
        "TCP_KEEPIDLE": max(1, round(silence_seconds / 3)),
        "TCP_KEEPINTVL": max(1, round(silence_seconds * 2 / 3 / probes)),
        "TCP_KEEPCNT": probes,
        # For sent data without an acknowledgement, during which there are no keepalive probes
        "TCP_USER_TIMEOUT": round(silence_seconds * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_unreachable(error: OSError) -> bool:
    """Whether a connection broke because the other host does not answer, not because the other process has ended."""
    return error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


def raise_open_files_limit() -> None:
    """Allow one connection for each rank. The usual soft limit is 1,024 open files; the hard limit is far above it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
