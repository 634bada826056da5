"""A command line that starts ranks, the environment it needs and the files it reads."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.ways import private_environment
from sparse_zero.errors import UserError
from sparse_zero.ranks import private_files
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
    """Contents, by path, of the files that it reads."""
    world_size: int | None = None
    """The number of ranks, if known."""
    private: dict[str, str] = field(default_factory=dict)
    """Variables of the ranks whose values may be secrets: they are in no command line, and are not shown."""
    private_file: Path | None = None
    """The file that brings them to other hosts, see `private_environment`. None: the command's environment does."""

    def shell(self) -> str:
        """The command and its environment as one shell line, with the names of private variables only."""
        removed = [word for name, value in self.environment.items() if value is None for word in ("-u", name)]
        # Only the value is quoted: the shell would take 'NAME=a value' for the name of a program.
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items() if value is not None]
        if self.private_file is None:
            # A shell ends with an error where such a variable is not set.
            assigned += [f'{name}="${{{name}?}}"' for name in self.private]
        return " ".join([*(["env", *removed] if removed else []), *assigned, shlex.join(self.argv)])

    def environ(self) -> dict[str, str]:
        """The whole environment of the command."""
        changed = {**os.environ, **self.environment, **(self.private if self.private_file is None else {})}
        return {name: value for name, value in changed.items() if value is not None}

    def shown_environment(self) -> dict[str, str | None]:
        """`environment` for people, with the names of private variables only."""
        private = {name: f"${name}" for name in self.private} if self.private_file is None else {}
        return {**self.environment, **private}

    def shown_files(self) -> dict[str, str]:
        """The files that the command reads, for people, with the names of private variables only."""
        if self.private_file is None:
            return self.files
        return {**self.files, str(self.private_file): private_environment.shown_text(self.private)}

    @contextlib.contextmanager
    def written_files(self) -> Iterator[None]:
        """The files exist within this block.

        Raises:
            UserError: a file cannot be written.
        """
        try:
            self._write_files()
            yield
        finally:
            for file in map(Path, [*self.files, *([self.private_file] if self.private_file else [])]):
                private_files.remove(file)

    def remove_private_file(self) -> None:
        """Remove the file of the private variables. No rank needs it when all have started."""
        if self.private_file is not None:
            private_files.remove(self.private_file)

    def _write_files(self) -> None:
        if self.private_file is not None:
            private_files.write(self.private_file, private_environment.text(self.private))
        for name, text in self.files.items():
            try:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch(mode=0o600)
                Path(name).write_text(text)
            except OSError as error:
                raise UserError(f"{name}: cannot be written ({error.strerror})") from None


def private_variables(launch: LaunchSection, watch: str | None = None) -> dict[str, str]:
    """The variables that the recipe gives every rank on every host, and the address of the watchdog.

    Raises:
        UserError: `launch.environment` names a variable without a value, and it is not set here.
    """
    variables = {}
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
