"""What each subcommand of `sparse-zero` does. Heavy imports stand inside, where they are needed."""

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_zero.errors import UserError


def train(arguments: argparse.Namespace) -> int:
    """Start the ranks of a recipe and wait for them, or print the command that would."""
    from launcher.local import training_command
    from sparse_zero.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    command = training_command(recipe, arguments.recipe, arguments.overrides, arguments.merge)
    if arguments.dry_run:
        if arguments.json:
            print_json({"command": command.argv, "environment": command.environment})
        else:
            print(command.shell())
        return 0

    from launcher import preflight, processes

    preflight.check(recipe)
    started = time.time()
    ending = processes.run(command, stdout=sys.stderr if arguments.json else None)
    if ending.status > 128 and not ending.stopped:
        raise_no_further = describe_death(ending.status)
        print(f"sparse-zero: error: {raise_no_further}", file=sys.stderr)
    if ending.status == 0 and arguments.json:
        print_json(_results(Path(str(recipe.training["output_dir"])) / "results.json", started))
    return ending.status
