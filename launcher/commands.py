"""What each subcommand of `sparse-zero` does. Heavy imports stand inside, where they are needed."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher import report
from sparse_zero.errors import UserError


def train(arguments: argparse.Namespace) -> int:
    """Start the ranks of a recipe and wait for them, or print the command that would."""
    from launcher.local import training_command
    from sparse_zero.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    command = training_command(recipe, arguments.recipe, arguments.overrides, arguments.merge)
    if arguments.dry_run:
        if arguments.json:
            report.print_json({"command": command.argv, "environment": command.environment})
        else:
            print(command.shell())
        return 0

    from launcher import preflight, processes

    preflight.check(recipe)
    started = time.time()
    ending = processes.run(command, stdout=sys.stderr if arguments.json else None)
    if ending.status > 128 and not ending.stopped:
        report.say_error(_cause_of_death(ending.status - 128))
    if ending.status == 0 and arguments.json:
        report.print_json(_read_results(Path(str(recipe.training["output_dir"])) / "results.json", started))
    return ending.status


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure an adapter on a recipe's evaluation examples."""
    from sparse_zero.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    adapter = _adapter_directory(arguments.adapter)
    _settle_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.evaluate import evaluate

        metrics = evaluate(recipe, adapter)
    if arguments.json:
        report.print_json(metrics)
    else:
        report.print_facts(f"{arguments.adapter} on {arguments.recipe}", metrics)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Write base model and adapter as a plain model directory."""
    adapter = _adapter_directory(arguments.adapter)
    _settle_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapter import write_merged

        facts = write_merged(adapter, Path(arguments.out))
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.adapter} merged", facts)
        print(f"next: {_loader(facts.get('task'))}.from_pretrained({arguments.out!r})")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Say what an adapter holds."""
    adapter = _adapter_directory(arguments.adapter)
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.inspect import describe

        facts = describe(adapter)
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(arguments.adapter, {name: fact for name, fact in facts.items() if name != "tensors"})
        report.print_rows(facts["tensors"])
    return 0


def _adapter_directory(name: str) -> Path:
    """Refuses a mistyped path before torch is imported."""
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{name}: no such adapter directory")
    return path


def _settle_accelerator() -> None:
    """Spares the user DeepSpeed's warning that it has detected no GPU."""
    from launcher.devices import count_accelerators

    if count_accelerators() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _loader(task: str | None) -> str:
    classes = {"sequence-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
    return classes.get(task, "AutoModel")


def _cause_of_death(signum: int) -> str:
    names = {known.value: known.name for known in signal.Signals}
    hint = "; the kernel does that when memory runs out" if signum == signal.SIGKILL else ""
    return f"a rank was ended by {names.get(signum, f'signal {signum}')}{hint}"


def _read_results(path: Path, started: float) -> dict[str, Any]:
    # A second of tolerance: a shared file system keeps its own time.
    if not path.is_file() or path.stat().st_mtime < started - 1:
        raise UserError(f"{path}: the run has ended, but wrote no results")
    return json.loads(path.read_text())
