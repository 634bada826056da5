"""A command line that starts ranks, with what it changes in the environment and the files that it reads."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_zero.errors import UserError
from sparse_zero.ranks.watchdog_client import WATCH_VARIABLE
from sparse_zero.recipe.launch import LaunchSection

TRAINING_MODULE = "sparse_zero.train"


@dataclass(frozen=True)
class Command:
    """What is run, exactly."""

    argv: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)
    """What it changes in this process's environment; None: the variable is removed."""
    files: dict[str, str] = field(default_factory=dict)
    """Contents of the files that must stand there first, by path."""
    world_size: int | None = None
    """How many ranks it starts, where that is known."""

    def shell(self) -> str:
        """The same as one line for a shell."""
        removed = [word for name, value in self.environment.items() if value is None for word in ("-u", name)]
        assigned = [f"{name}={value}" for name, value in self.environment.items() if value is not None]
        return shlex.join([*(["env", *removed] if removed else []), *assigned, *self.argv])

    def environ(self) -> dict[str, str]:
        """The whole environment of the command."""
        changed = {**os.environ, **self.environment}
        return {name: value for name, value in changed.items() if value is not None}

    def write_files(self) -> None:
        """Raises UserError: one cannot be written."""
        for name, text in self.files.items():
            try:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch(mode=0o600)
                Path(name).write_text(text)
            except OSError as error:
                raise UserError(f"{name}: cannot be written ({error.strerror})") from None


def rank_environment(launch: LaunchSection, watch: str | None = None) -> dict[str, str]:
    """The variables that every rank is given, on whatever host.

    Raises UserError: `launch.environment` asks to pass on a variable that is not set here.
    """
    variables = {}
    for name, value in launch.environment.items():
        if value is None and name not in os.environ:
            raise UserError(f"launch.environment: {name} is to be passed on, but is not set here; give it a value")
        variables[name] = os.environ[name] if value is None else value
    if watch is not None:
        variables[WATCH_VARIABLE] = watch
    return variables


def wrapped(argv: Sequence[str], launch: LaunchSection) -> list[str]:
    """`argv` within the recipe's container, after its prologue."""
    inside = [*launch.container, *argv]
    if not launch.prologue:
        return inside
    script = "\n".join(["set -e", *launch.prologue, 'exec "$@"'])
    return ["bash", "-c", script, "bash", *inside]
