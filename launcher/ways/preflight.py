"""Checks of a run before its ranks are started. Imports no torch."""

import json
from pathlib import Path

from launcher.ways import devices, launchers
from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Raises UserError: a package of a `package://` address or a launcher is not installed, a host cannot be reached,
    the port is in use, the output directory is a file, or the DeepSpeed file is not JSON.
    """
    for address in (recipe.model.source, recipe.model.tokenizer, recipe.data.path):
        package_path(address or "")
    launchers.check_programs(recipe.launch)
    if recipe.launch.hostfile:
        check_hosts(recipe)
    elif recipe.launch.launcher != "slurm":
        _check_port(recipe.launch.master_port)
    _check_output_directory(Path(str(recipe.training["output_dir"])))
    if isinstance(recipe.training.get("deepspeed"), str):
        check_json(Path(recipe.training["deepspeed"]))


def check_hosts(recipe: Recipe) -> None:
    """Raises UserError: ranks cannot be started on a host of the hostfile."""
    names = launchers.host_names(recipe)
    problems = launchers.unreachable(recipe, names)
    if problems:
        lost = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(f"launch.hostfile: {len(problems)} of {len(names)} hosts cannot be reached: {lost}")


def _check_port(port: int | str) -> None:
    if port != "auto" and not devices.port_is_free(int(port)):
        raise UserError(f"launch.master_port: {port} is in use on this machine; give another, or auto")


def _check_output_directory(output: Path) -> None:
    for path in (output, *output.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"training.output_dir: {output}: {path} is a file, not a directory")
            return


def check_json(path: Path) -> None:
    """Raises UserError: `training.deepspeed` is not JSON."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed: {path}: not JSON: {error}") from None
