"""The watchdog's end of a connection. Does not import torch."""

import contextlib
import json
import socket
import time
from typing import Any

from sparse_zero.ranks.failures import RankInfo
from sparse_zero.ranks.messages import Messages, random_text

_MAX_LINE_BYTES = 1 << 20
"""The longest message is a traceback."""


class Connection:
    """A connection to a rank, or to a stranger: assembles received bytes into messages."""

    def __init__(self, connection: socket.socket, token: str) -> None:
        self.socket = connection
        self.accepted_at = time.monotonic()
        self._token, self._challenge = token, random_text()
        self._messages: Messages | None = None
        """None until the rank has sent its nonce."""
        self.info: RankInfo | None = None
        """None until the rank has introduced itself."""
        self.has_left = False
        self.is_stopping = False
        """Whether the rank has answered the request to stop."""
        self._received = b""
        self._send_line(json.dumps({"challenge": self._challenge}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Read what has arrived.

        Returns:
            The complete messages; None at the end of the stream.

        Raises:
            OSError: the connection broke.
            ValueError, KeyError, TypeError, RecursionError: the data is not a message of a rank.
        """
        data = self.socket.recv(1 << 16)
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > (_MAX_LINE_BYTES if self.info else 4096):
            raise ValueError("the line is too long for a message")
        if lines and self._messages is None:
            nonce = str(json.loads(lines.pop(0))["nonce"])
            self._messages = Messages(self._token, self._challenge, nonce, "watchdog")
        return [self._messages.read(line) for line in lines] if self._messages else []

    def send(self, message: dict[str, Any]) -> None:
        """Args: message: to a rank that has introduced itself."""
        self._send_line(self._messages.write(message))

    def _send_line(self, line: bytes) -> None:
        # Messages are short, so the kernel accepts them at once. A broken connection is noticed by `receive`.
        with contextlib.suppress(OSError):
            self.socket.send(line)
