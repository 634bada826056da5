"""Messages between a rank and the watchdog: lines of JSON, authenticated with the secret of the run.

Whoever opens a connection must know the secret, which is never sent:

    watchdog  {"challenge": C}                    C and N are random
    rank      {"nonce": N}
    both      AUTHENTICATOR JSON, for each message

The authenticator is an HMAC-SHA256 of the JSON under a key that the secret, C and N give. It also covers who sends the
message and how many came before, so a message that was recorded, reordered, or sent back is not accepted.
"""

import hmac
import json
import secrets
from typing import Any, Literal

Side = Literal["rank", "watchdog"]


def random_text() -> str:
    """A secret, a challenge or a nonce: 128 random bits as hexadecimal digits."""
    return secrets.token_hex(16)


class Messages:
    """Writes the messages of one end of a connection, and reads those of the other end.

    Args:
        token: the secret of the run.
        challenge, nonce: the random texts of this connection.
        side: this end.
    """

    def __init__(self, token: str, challenge: str, nonce: str, side: Side) -> None:
        self._key = hmac.digest(token.encode(), f"{challenge} {nonce}".encode(), "sha256")
        self._own, self._other = side, "rank" if side == "watchdog" else "watchdog"
        self._sent = self._received = 0

    def write(self, message: dict[str, Any]) -> bytes:
        """The line of the next message."""
        body = json.dumps(message).encode()
        line = self._authenticator(self._own, self._sent, body) + b" " + body + b"\n"
        self._sent += 1
        return line

    def read(self, line: bytes) -> dict[str, Any]:
        """Read the next message of the other end.

        Raises:
            ValueError: it is not from an end that knows the secret, or not the next one.
        """
        authenticator, _, body = line.rstrip(b"\n").partition(b" ")
        if not hmac.compare_digest(authenticator, self._authenticator(self._other, self._received, body)):
            raise ValueError("the sender of the message does not know the secret of the run")
        self._received += 1
        return json.loads(body)

    def _authenticator(self, side: str, count: int, body: bytes) -> bytes:
        return hmac.digest(self._key, f"{side} {count} ".encode() + body, "sha256").hex().encode()
