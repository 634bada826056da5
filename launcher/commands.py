"""The subcommands of `sparse-zero`. Each imports the libraries it needs when it runs."""

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import report
from launcher.accelerator import set_accelerator
from launcher.ways.command import Command
from sparse_zero.errors import UserError, refuse_to_overwrite

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
        _check_settings(recipe, arguments.json, everything=False)
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


def _load_recipe_to_launch(path: str, overrides: list[str]) -> "Recipe":
    """`load_recipe`, and a warning of each secret in the recipe."""
    from sparse_zero.recipe.recipe import load_recipe
    from sparse_zero.recipe.secrets import warnings

    recipe = load_recipe(path, overrides)
    for warning in warnings(recipe):
        report.say_warning(f"{path}: {warning}")
    return recipe


def _show(command: Command, as_json: bool) -> None:
    """Print the command that would start the ranks, and the files that it would read."""
    if as_json:
        shown = {"environment": command.shown_environment(), "files": command.shown_files()}
        report.print_json({"command": command.argv, **shown})
        return
    for name, text in command.shown_files().items():
        print(f"# {name}\n{text}")
    print(command.shell())


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


def init(arguments: argparse.Namespace) -> int:
    """Write a recipe for a data set."""
    name = Path(arguments.data.rstrip("/")).name.split(".")[0] or "recipe"
    out = Path(arguments.out or f"{name}.yaml")
    if out.exists():
        raise UserError(f"{out}: already exists; name another file with --out")
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.planning.proposal import propose

        proposal = propose(arguments.data, arguments.model, arguments.quantize)
    out.write_text(proposal.text, encoding="utf-8")
    if arguments.json:
        facts = {"out": str(out), "form": proposal.form.name, "notes": proposal.notes}
        report.print_json(facts | {"recipe": proposal.recipe.model_dump(exclude_unset=True)})
    else:
        print(f"{arguments.data}: {proposal.form.name}\n\n{proposal.text}")
        report.print_notes(proposal.notes)
        print(f"written: {out}\nnext: sparse-zero data {shlex.quote(str(out))}")
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Show what the model will see of a recipe's data."""
    from sparse_zero.recipe.recipe import load_recipe

    if arguments.examples < 0:
        raise UserError(f"--examples {arguments.examples}: must be at least 0")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.data.preview import describe_data

        facts = describe_data(recipe, arguments.examples)
    if arguments.json:
        report.print_json(facts)
    else:
        from launcher.data_report import print_data

        print_data(arguments.recipe, facts)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Check a recipe's settings without loading data or weights."""
    from launcher.ways import preflight
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    preflight.check(recipe)
    _check_settings(recipe, arguments.json, everything=True)
    if arguments.json:
        report.print_json({"recipe": arguments.recipe, "valid": True})
    else:
        print(f"{arguments.recipe}: no mistake found (data and weights were not loaded)")
    return 0


def _check_settings(recipe: "Recipe", as_json: bool, everything: bool) -> None:
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
            recipe_check.load_rewards(recipe)
            config = recipe_check.load_model_config(recipe)
        except UserError as error:
            if everything:
                raise
            print(f"{report.PROGRAM}: not checked on this machine: {error}", file=sys.stderr)
        else:
            recipe_check.check_model(recipe, config, arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate an adapter on a recipe's evaluation examples."""
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    adapter = _adapter_directory(arguments.adapter, arguments.revision)
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.training.evaluate import evaluate

        metrics = evaluate(recipe, adapter)
    if arguments.json:
        report.print_json(metrics)
    else:
        report.print_facts(f"{arguments.adapter} on {arguments.recipe}", metrics)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Write base model + adapter as a plain model directory."""
    adapter = _adapter_directory(arguments.adapter, arguments.revision)
    refuse_to_overwrite(Path(arguments.out))
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.merging import write_merged

        facts = write_merged(
            adapter,
            Path(arguments.out),
            arguments.scale,
            arguments.force,
            arguments.trust_remote_code,
            quantize=arguments.quantize,
            prompts=arguments.prompt,
        )
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.adapter} merged", facts)
        print(f"next: {_loader(facts.get('task'))}.from_pretrained({arguments.out!r})")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Turn the shards of a checkpoint into an adapter."""
    checkpoint = Path(arguments.checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint")
    refuse_to_overwrite(Path(arguments.out))
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.checkpoint.export import export

        facts = export(checkpoint, Path(arguments.out))
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.checkpoint} exported", facts)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Write an adapter, or the changes of a fine-tuned model, in another format."""
    source = _adapter_directory(arguments.adapter, arguments.revision)
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.formats.convert import convert

        facts = convert(source, Path(arguments.out), arguments.to, arguments.base, arguments.max_density)
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.adapter} converted", {k: v for k, v in facts.items() if k != "notes"})
        report.print_notes(facts["notes"])
    return 0


def combine(arguments: argparse.Namespace) -> int:
    """Write a weighted combination of adapters as a new adapter."""
    adapters = [_adapter_directory(name) for name in arguments.adapters]
    refuse_to_overwrite(Path(arguments.out))
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.combine import combine_adapters

        combined = combine_adapters(
            adapters,
            arguments.out,
            arguments.weights,
            arguments.combination_type,
            arguments.density,
            arguments.seed,
        )
    facts = {
        "out": arguments.out,
        "base_model": combined.config.base_model_name_or_path,
        "combination_type": arguments.combination_type,
        "trainable_parameters": combined.config.trainable_parameters,
    }
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{len(adapters)} adapters combined", facts)
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Describe an adapter."""
    adapter = _adapter_directory(arguments.adapter, arguments.revision)
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.inspection import describe

        facts = describe(adapter, arguments.base)
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_description(arguments.adapter, facts)
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


def _adapter_directory(name: str, revision: str | None = None) -> Path:
    """Checks the path before torch is imported; downloads what is on the hub."""
    from sparse_zero.adapters.hub import adapter_directory

    path = Path(name)
    if (path / "adapter" / "adapter_config.json").is_file() and not (path / "adapter_config.json").exists():
        raise UserError(f"{name}: is the directory of a run; its adapter is {path / 'adapter'}")
    return adapter_directory(name, revision)


def _loader(task: str | None) -> str:
    classes = {"sequence-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
    return classes.get(task, "AutoModel")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Differs after the file is rewritten. Times are not compared: clocks may run backwards."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def recipes(arguments: argparse.Namespace) -> int:
    """List the shipped recipes, DeepSpeed files and batch scripts, or copy one."""
    from sparse_zero.recipe import shipped

    if arguments.action == "copy":
        copied = str(shipped.copy(arguments.name, arguments.to))
        if arguments.json:
            report.print_json({"name": arguments.name, "path": copied})
        else:
            print(copied)
        return 0
    found = [file._asdict() for file in shipped.describe()]
    if arguments.json:
        report.print_json([{**row, "path": str(shipped.directory() / row["name"])} for row in found])
    else:
        report.print_rows(found)
    return 0


def keys(arguments: argparse.Namespace) -> int:
    """Print the keys of a recipe."""
    from launcher.recipe_keys import describe
    from sparse_zero.recipe.recipe import Recipe

    if arguments.json and arguments.key:
        raise UserError("--json prints the schema of whole recipes: leave KEY out")
    if arguments.json:
        report.print_json(Recipe.model_json_schema())
    else:
        print(describe(arguments.key).lstrip("\n"))
    return 0
