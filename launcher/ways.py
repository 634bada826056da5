"""The ways to start ranks: one recipe, any launcher."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher import devices, reach
from launcher.command import Command
from launcher.hostfile import Host
from launcher.local import local_command
from launcher.remote import hosts_of, remote_command
from launcher.slurm import slurm_command
from sparse_zero.errors import UserError
from sparse_zero.recipe import Recipe


def ranks_command(
    recipe: Recipe, words: Sequence[str], watch: str | None = None, left: Sequence[str] | None = None
) -> Command:
    """What starts `python -m words[0] words[1:]` on every rank of a recipe's `launch` section.

    Args: watch: the address of the ranks' roll call; left: the names of the hosts to use, of all those of the recipe.

    Raises UserError: a `launch` section that does not fit this machine or its hostfile.
    """
    launch, use_cpu = recipe.launch, bool(recipe.training.get("use_cpu"))
    if launch.launcher == "slurm":
        return slurm_command(launch, words, use_cpu, watch, left)
    if launch.hostfile:
        hosts = [host for host in hosts_of(launch) if left is None or host.name in left]
        return remote_command(launch, hosts, words, launch_directory(recipe), use_cpu, watch)
    if launch.launcher == "mpi":
        ranks = devices.count_ranks(launch.processes_per_node, 0 if use_cpu else devices.count_accelerators())
        return remote_command(launch, [Host("localhost", ranks)], words, launch_directory(recipe), use_cpu, watch)
    return local_command(launch, list(words), use_cpu, watch)


def launch_directory(recipe: Recipe) -> Path:
    """Where the files stand that a launcher reads."""
    return Path(str(recipe.training["output_dir"])) / "launch"


def host_names(recipe: Recipe) -> list[str]:
    """The hosts that a run of this recipe has, as its launcher calls them; empty: this machine alone."""
    if recipe.launch.hostfile:
        return [host.name for host in hosts_of(recipe.launch)]
    if recipe.launch.launcher == "slurm" and "SLURM_JOB_NODELIST" in os.environ:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True
        )
        names = shown.stdout.split()
        return names if recipe.launch.nodes == "auto" else names[: int(recipe.launch.nodes)]
    return []


def unreachable(recipe: Recipe, names: Sequence[str]) -> dict[str, str]:
    """Which of these hosts ranks cannot be started on now, and why."""
    if recipe.launch.launcher == "slurm":
        return reach.unreachable_nodes(names)
    if recipe.launch.launcher == "mpi":
        # mpirun starts what runs here without ssh.
        names = [name for name in names if name not in ("localhost", socket.gethostname())]
    return reach.unreachable_hosts(names)


def watching_address(recipe: Recipe, names: Sequence[str]) -> str:
    """By which address the ranks reach this process."""
    if recipe.launch.launcher != "slurm" and not recipe.launch.hostfile:
        return "127.0.0.1"
    others = [name for name in names if name not in ("localhost", socket.gethostname())]
    return reach.own_address(others[0]) if others else socket.gethostname()


def check_programs(recipe: Recipe) -> None:
    """Raises UserError: a program that this way needs is not installed."""
    launch = recipe.launch
    needed = {"slurm": ["srun"], "mpi": ["mpirun"]}.get(launch.launcher, [])
    if launch.hostfile and launch.launcher == "torchrun":
        needed = ["pdsh"]
    elif launch.hostfile and launch.launcher == "deepspeed":
        needed = ["pdsh"] if launch.multinode == "pdsh" else ["mpirun", "ompi_info"]
    for program in needed:
        if shutil.which(program) is None:
            raise UserError(f"launch.launcher: {launch.launcher} needs the program {program}, which is not installed")
