"""A rank of `sparse_zero.train` that is killed, or gets a signal, at a chosen point. Forked by fork_server.py."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
from checkpoint_worker import FILE_LIMIT, limit_files
from transformers.trainer_callback import CallbackHandler

import sparse_zero.training.run
from sparse_zero import train
from sparse_zero.checkpoint import directory, manifest, shards, writer
from sparse_zero.ranks.stop_signals import _SAME_REQUEST_SECONDS
from sparse_zero.training.trainer import SparseTrainer

CALLS: dict[str, tuple[Any, str]] = {
    "load": (shards.TensorFile, "_checked_block"),
    "data": (sparse_zero.training.run, "build"),
    "forward": (SparseTrainer, "compute_loss"),
    "backward": (accelerate.Accelerator, "backward"),
    "step": (CallbackHandler, "on_pre_optimizer_step"),
    "after-step": (CallbackHandler, "on_optimizer_step"),
    "evaluate": (CallbackHandler, "on_prediction_step"),
    "save": (writer.CheckpointWriter, "save"),
    "complete": (writer.CheckpointWriter, "_complete"),
    "publish": (writer, "publish"),
    "rename": (Path, "rename"),
    "delete": (directory.shutil, "rmtree"),
}
"""The functions before whose n-th call on a rank it happens; `write:NAME` is in the middle of writing such a file."""


def run(argv: list[str], fault: dict[str, Any] | None, ledger: str | None = None) -> int:
    """Args: fault: point, rank, number (from 1), action; ledger: a file that gets the step of each finished save."""
    if fault is not None and os.environ["RANK"] == str(fault["rank"]):
        arm(fault)
    if ledger is not None and os.environ["RANK"] == "0":
        keep_ledger(ledger)
    return train.main(argv)


def arm(fault: dict[str, Any]) -> None:
    left = fault["number"]

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            ACTIONS[fault["action"]]()

    point, _, name = fault["point"].partition(":")
    if point == "write":
        break_writes(name, count)
        return
    owner, attribute = CALLS[point]
    original = getattr(owner, attribute)

    def counted(*args: Any, **kwargs: Any) -> Any:
        count()
        return original(*args, **kwargs)

    setattr(owner, attribute, counted)


def break_writes(name: str, count: Callable[[], None]) -> None:
    original_write, original_open = shards.write_bytes, Path.open

    def halves(pieces: Any) -> Iterator[bytes]:
        content = b"".join(bytes(piece) for piece in pieces)
        yield content[: len(content) // 2]
        count()
        yield content[len(content) // 2 :]

    def write_bytes(path: Path, pieces: Any) -> Any:
        return original_write(path, halves(pieces) if name in path.name else pieces)

    def unbuffered(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return original_open(self, mode, *args, **kwargs | ({"buffering": 0} if mode == "wb" else {}))

    for module in (shards, manifest, writer):
        module.write_bytes = write_bytes
    Path.open = unbuffered


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def warn() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def ask_when_full() -> None:
    limit_files(FILE_LIMIT)
    ask()


def insist() -> None:
    ask()
    time.sleep(_SAME_REQUEST_SECONDS + 0.1)
    ask()


ACTIONS = {
    "kill": kill,
    "kill-all": kill_all,
    "ask": ask,
    "warn": warn,
    "insist": insist,
    "ask-when-full": ask_when_full,
}


def keep_ledger(file: str) -> None:
    original = writer.CheckpointWriter.finish

    def finish(self: Any) -> Path | None:
        saved = original(self)
        if saved is not None:
            with open(file, "a") as ledger:
                ledger.write(f"{saved.name.partition('-')[2]}\n")
        return saved

    writer.CheckpointWriter.finish = finish
