"""The subcommands that start a run, or check or predict it. Each imports the libraries it needs when it runs."""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import report
from launcher.accelerator import set_accelerator
from launcher.ways.command import Command
from sparse_zero.errors import UserError

if TYPE_CHECKING:
    from sparse_zero.recipe.recipe import Recipe


def train(arguments: argparse.Namespace) -> int:
    """Start the ranks of a recipe and wait for them, or print the command that would start them."""
    from launcher import supervise
    from launcher.processes import killed_by
    from launcher.ways import launchers
    from launcher.ways.command import TRAINING_MODULE
    from sparse_zero.recipe.secrets import hide_values

    recipe = _load_recipe_to_launch(arguments.recipe, arguments.overrides)
    if arguments.find_rate and (arguments.merge or arguments.resume):
        raise UserError("--find-rate: nothing is kept of these steps; leave --merge and --resume out")
    if arguments.resume not in (None, "auto") and not Path(arguments.resume).is_dir():
        raise UserError(f"--resume {arguments.resume}: no such checkpoint")
    if arguments.reset and not (arguments.resume or recipe.training.get("resume_from_checkpoint")):
        raise UserError("--reset: needs --resume, because without a checkpoint everything is taken from the recipe")
    options = [
        *(["--merge"] if arguments.merge else []),
        *(["--find-rate"] if arguments.find_rate else []),
        *([f"--resume={arguments.resume}"] if arguments.resume else []),
        *([f"--reset={','.join(arguments.reset)}"] if arguments.reset else []),
    ]
    words = [TRAINING_MODULE, arguments.recipe, *hide_values(arguments.overrides)[0], *options]
    if arguments.dry_run:
        command = launchers.ranks_command(recipe, words)
        check_settings(recipe, arguments.json, everything=False)
        _show(command, arguments.json)
        return 0

    from launcher.ways import preflight

    preflight.check(recipe)
    name = "learning_rates.json" if arguments.find_rate else "results.json"
    results = Path(str(recipe.training["output_dir"])) / name
    before = _identity(results)
    ending = supervise.run(recipe, words, stdout=sys.stderr if arguments.json else None)
    if ending.status > 128 and not ending.stopped and not ending.is_explained:
        report.say_error(f"a rank {killed_by(ending.status - 128)}")
    if ending.status == 0 and arguments.json:
        if _identity(results) == before:
            raise UserError(f"{results}: the run has finished, but wrote no results")
        report.print_json(json.loads(results.read_text()))
    return ending.status


def submit(arguments: argparse.Namespace) -> int:
    """Submit a run as a Slurm job, or print the script that would be submitted."""
    from launcher.jobs import submit

    recipe = _load_recipe_to_launch(arguments.recipe, [*arguments.overrides, "launch.launcher=slurm"])
    job = submit.plan(recipe, arguments.recipe, arguments.overrides, arguments.sbatch_options, arguments.merge)
    facts = {"script": str(job.script), "command": job.command.argv, "options": job.options}
    if arguments.dry_run:
        if arguments.json:
            report.print_json(facts | {"environment": job.command.shown_environment(), "text": job.text})
        else:
            print(f"{job.text}\n{job.command.shell()}")
        return 0

    from launcher.ways import preflight

    preflight.check(recipe)
    submission = submit.submit(job)
    commands = submission.commands(job.command)
    if submission.warnings:
        print(submission.warnings, file=sys.stderr)
    if arguments.json:
        facts |= {"job": submission.job, "cluster": submission.cluster, "log": submission.log, **commands}
        report.print_json({name.replace(" ", "_"): fact for name, fact in facts.items()})
    else:
        shown = {"script": str(job.script), "log": submission.log, **commands}
        report.print_facts(f"job {submission.job} submitted", shown)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Check a recipe's settings without loading data or weights."""
    from launcher.ways import preflight
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    preflight.check(recipe)
    check_settings(recipe, arguments.json, everything=True)
    if arguments.json:
        report.print_json({"recipe": arguments.recipe, "valid": True})
    else:
        print(f"{arguments.recipe}: no mistake found (data and weights were not loaded)")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check the hosts, the network and Slurm before a run."""
    from launcher.doctor import links
    from launcher.doctor.diagnosis import diagnose
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides) if arguments.recipe else None
    diagnosis = diagnose(recipe, arguments.recipe, arguments.overrides, with_ranks=not arguments.no_ranks)
    if arguments.json:
        report.print_json(diagnosis.to_json())
    else:
        report.print_diagnosis(diagnosis.findings, links.table_rows(diagnosis.measured) if diagnosis.measured else [])
    return diagnosis.status


def plan(arguments: argparse.Namespace) -> int:
    """Predict the memory and the communication of each rank, without loading a weight."""
    from launcher.plan_report import print_plan
    from sparse_zero.planning.gpu_memory import gpu_memory_bytes
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    memory = None if arguments.gpu_memory is None else gpu_memory_bytes(arguments.gpu_memory)
    bandwidth = None if arguments.bandwidth is None else arguments.bandwidth * 1e9
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.planning.plan import check_ranks, plan
        from sparse_zero.planning.planned_run import describe_run

        check_ranks(arguments.ranks, arguments.nodes, bandwidth)
        facts = plan(describe_run(recipe), arguments.ranks, arguments.nodes, memory, bandwidth)
    if arguments.json:
        report.print_json(facts)
    else:
        print_plan(arguments.recipe, facts)
    return 0


def _load_recipe_to_launch(path: str, overrides: list[str]) -> "Recipe":
    """`load_recipe`, and a warning of each secret in the recipe."""
    from sparse_zero.recipe.recipe import load_recipe
    from sparse_zero.recipe.secrets import warnings

    recipe = load_recipe(path, overrides)
    for warning in warnings(recipe):
        report.say_warning(f"{path}: {warning}")
    return recipe


def check_settings(recipe: "Recipe", as_json: bool, everything: bool) -> None:
    """Ask the libraries that will read the recipe.

    Args: everything: also the data files and the model's configuration. Without it, a line says if this machine does
        not have them.

    Raises UserError: a setting is refused.
    """
    missing = [name for name in ("torch", "transformers", "datasets", "deepspeed") if find_spec(name) is None]
    if missing:
        if everything:
            raise UserError(f"{missing[0]} is not installed, and `sparse-zero check` asks it")
        print(f"{report.PROGRAM}: not checked on this machine: {missing[0]} is not installed", file=sys.stderr)
        return
    set_accelerator()
    with report.only_json_on_stdout(as_json):
        from sparse_zero.data.files import check_path
        from sparse_zero.training import recipe_check
        from sparse_zero.training.build import training_arguments

        arguments = training_arguments(recipe)
        recipe_check.check_settings(recipe, arguments)
        try:
            check_path(recipe.data)
            recipe_check.check_augment(recipe.data)
            recipe_check.load_rewards(recipe)
            config = recipe_check.load_model_config(recipe)
        except UserError as error:
            if everything:
                raise
            print(f"{report.PROGRAM}: not checked on this machine: {error}", file=sys.stderr)
        else:
            recipe_check.check_model(recipe, config, arguments)


def _show(command: Command, as_json: bool) -> None:
    """Print the command that would start the ranks, and the files that it would read."""
    if as_json:
        shown = {"environment": command.shown_environment(), "files": command.shown_files()}
        report.print_json({"command": command.argv, **shown})
        return
    for name, text in command.shown_files().items():
        print(f"# {name}\n{text}")
    print(command.shell())


def _identity(path: Path) -> tuple[int, ...] | None:
    """Differs after the file is rewritten. Times are not compared: clocks may run backwards."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
