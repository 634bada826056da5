"""Recipes of several hosts n1 to n3, and the commands that start their ranks."""

import shlex
import sys
from typing import Any

from launcher.ways.command import Command
from launcher.ways.launchers import ranks_command
from sparse_zero.recipe.recipe import Recipe

WORDS = ["sparse_zero.train", "recipe.yaml", "training.seed=7"]
RANK = [sys.executable, "-u", "-m", *WORDS]


def recipe(launcher: str, training: dict[str, Any] | None = None, **launch: Any) -> Recipe:
    if launcher != "slurm":
        launch = {"hostfile": "hosts"} | launch
    raw = {"model": {"name": "m"}, "data": {"path": "d", "columns": {"text": "t", "label": "l"}}}
    raw |= {"launch": {"launcher": launcher} | launch, "training": {"output_dir": "out"} | (training or {})}
    return Recipe.model_validate(raw)


def command(launcher: str, words: list[str] = WORDS, watch: str | None = None, **launch: Any) -> Command:
    return ranks_command(recipe(launcher, **launch), words, watch)


def hostfile(made: Command) -> str:
    return made.files["out/launch/hostfile"]


def torchrun(made: Command, hosts: str = "n1") -> list[str]:
    """The words that a shell on the host of number 1 makes of pdsh's command line."""
    assert made.argv[:-1] == ["pdsh", "-S", "-f", "1024", "-R", "ssh", "-w", hosts]
    # As pdsh does
    line = "%".join(part.replace("%n", "1") for part in made.argv[-1].split("%%"))
    return shlex.split(line)
