"""The subcommands that make a recipe and show what it means. Each imports the libraries it needs when it runs."""

import argparse
import shlex
from pathlib import Path

from launcher import report
from launcher.accelerator import set_accelerator
from sparse_zero.errors import UserError


def init(arguments: argparse.Namespace) -> int:
    """Write a recipe for a data set."""
    name = Path(arguments.data.rstrip("/")).name.split(".")[0] or "recipe"
    out = Path(arguments.out or f"{name}.yaml")
    if out.exists():
        raise UserError(f"{out}: already exists; name another file with --out")
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.planning.proposal import propose

        proposal = propose(arguments.data, arguments.model, arguments.objective, arguments.quantize)
    out.write_text(proposal.text, encoding="utf-8")
    if arguments.json:
        facts = {"out": str(out), "form": proposal.form.name, "notes": proposal.notes}
        report.print_json(facts | {"recipe": proposal.recipe.model_dump(exclude_unset=True)})
    else:
        print(f"{arguments.data}: {proposal.form.name}\n\n{proposal.text}")
        report.print_notes(proposal.notes)
        next_command = "check" if proposal.form.objective else "data"
        print(f"written: {out}\nnext: sparse-zero {next_command} {shlex.quote(str(out))}")
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
