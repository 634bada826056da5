"""A command line that starts ranks, the environment it needs and the files it reads."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_zero.errors import UserError
from sparse_zero.ranks.watchdog_client import WATCH_VARIABLE
from sparse_zero.recipe.launch import LaunchSection

TRAINING_MODULE = "sparse_zero.train"
ONE_MACHINE = "one-machine"
"""The rendezvous of `launcher.ways.torchrun` for a single agent."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Keeps the working directory off Python's path: the user's files there may be called datasets.py or torch/."""


@dataclass(frozen=True)
class Command:
    """A command with everything it needs."""

    argv: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)
    """Changes to this process's environment; None removes the variable."""
    files: dict[str, str] = field(default_factory=dict)
    """Contents, by path, of the files to write before the command starts."""
    world_size: int | None = None
    """The number of ranks, if known."""

    def shell(self) -> str:
        """The command and its environment as one shell line."""
        removed = [word for name, value in self.environment.items() if value is None for word in ("-u", name)]
        # Only the value is quoted: the shell would take 'NAME=a value' for the name of a program.
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items() if value is not None]
        return " ".join([*(["env", *removed] if removed else []), *assigned, shlex.join(self.argv)])

    def environ(self) -> dict[str, str]:
        """The whole environment of the command."""
        changed = {**os.environ, **self.environment}
        return {name: value for name, value in changed.items() if value is not None}

    def write_files(self) -> None:
        """Raises UserError: a file cannot be written."""
        for name, text in self.files.items():
            try:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch(mode=0o600)
                Path(name).write_text(text)
            except OSError as error:
                raise UserError(f"{name}: cannot be written ({error.strerror})") from None


def rank_environment(launch: LaunchSection, watch: str | None = None) -> dict[str, str]:
    """The variables of every rank on every host.

    Raises:
        UserError: `launch.environment` names a variable without a value, and it is not set here.
    """
    variables = dict(SAFE_PATH)
    for name, value in launch.environment.items():
        if value is None and name not in os.environ:
            raise UserError(f"launch.environment: {name} has no value and is not set here; give it a value")
        variables[name] = os.environ[name] if value is None else value
    if watch is not None:
        variables[WATCH_VARIABLE] = watch
    return variables


def wrapped(argv: Sequence[str], launch: LaunchSection) -> list[str]:
    """`argv` inside the recipe's container, after its prologue."""
    inside = [*launch.container, *argv]
    if not launch.prologue:
        return inside
    script = "\n".join(["set -e", *launch.prologue, 'exec "$@"'])
    return ["bash", "-c", script, "bash", *inside]
