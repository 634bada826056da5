"""What a call on damaged files may do: succeed, or raise one UserError, in bounded time and memory."""

import contextlib
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from sparse_zero.errors import UserError

SECONDS, MIB = 5.0, 1024


class TooSlow(BaseException):
    """Not an Exception, so that nothing catches it on its way."""


def outcome(call: Callable[[], object]) -> UserError | None:
    """Run a call in SECONDS and with MIB of memory more than now. Any other error than UserError is raised.

    Returns: the error, or None if the call succeeded.
    """
    started = time.monotonic()
    try:
        with limited():
            call()
    except UserError as error:
        assert_readable(str(error))
        return error
    finally:
        spent = time.monotonic() - started
    assert spent < SECONDS, f"{spent:.1f} seconds"
    return None


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limits of time and address space for this block. It must run in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MIB * 2**20, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def assert_readable(message: str) -> None:
    """A message of one line that a terminal can show: it has no control characters and is not endless."""
    assert message.strip() == message != "", repr(message)
    assert all(character.isprintable() or character == "\n" for character in message), repr(message)
    assert len(message) < 2000, f"{len(message)} characters: {message[:200]}"
    message.encode()


def bits(model: nn.Module) -> dict[str, tuple[type, torch.dtype, bytes]]:
    """All parameters and buffers, bit for bit, and the class of each module, to compare before and after."""
    kinds = {f"class of {name}": (type(module), torch.uint8, b"") for name, module in model.named_modules()}
    named = [*model.named_parameters(), *model.named_buffers()]
    return kinds | {
        name: (type(tensor), tensor.dtype, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in named
    }


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
