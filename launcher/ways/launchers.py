"""The launchers that a recipe can choose: the command, the hosts and the programs of each."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.ways import devices, reachability
from launcher.ways.command import Command
from launcher.ways.hostfile import Host
from launcher.ways.local import local_command
from launcher.ways.remote import hosts_of, remote_command
from launcher.ways.slurm import slurm_command
from sparse_zero.errors import UserError
from sparse_zero.ranks.network import address_towards
from sparse_zero.recipe.launch import LaunchSection
from sparse_zero.recipe.recipe import Recipe


def ranks_command(
    recipe: Recipe, words: Sequence[str], watch: str | None = None, names: Sequence[str] = ()
) -> Command:
    """The command that starts `python -m words[0] words[1:]` on every rank of a recipe's `launch` section.

    Args:
        watch: the address of the ranks' watchdog.
        names: the hosts of the recipe to use; empty: all.

    Raises:
        UserError: the `launch` section does not fit this machine or its hostfile.
    """
    launch, use_cpu = recipe.launch, bool(recipe.training.get("use_cpu"))
    if launch.launcher == "slurm":
        return slurm_command(launch, words, use_cpu, watch, names)
    if launch.hostfile:
        hosts = [host for host in hosts_of(launch) if not names or host.name in names]
        return remote_command(launch, hosts, words, launch_directory(recipe), use_cpu, watch)
    if launch.launcher == "mpi":
        ranks = devices.count_ranks(launch.processes_per_node, 0 if use_cpu else devices.count_accelerators())
        return remote_command(launch, [Host("localhost", ranks)], words, launch_directory(recipe), use_cpu, watch)
    return local_command(launch, list(words), use_cpu, watch)


def launch_directory(recipe: Recipe) -> Path:
    """The directory of the files that a launcher reads."""
    return Path(str(recipe.training["output_dir"])) / "launch"


def host_names(recipe: Recipe) -> list[str]:
    """The hosts of a run of this recipe, as its launcher calls them; empty: this machine alone."""
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
    """The hosts among `names` on which no rank can be started now, each with the reason."""
    if recipe.launch.launcher == "slurm":
        return reachability.unreachable_nodes(names)
    return reachability.unreachable_hosts([name for name in names if not starts_here(recipe.launch, name)])


def starts_here(launch: LaunchSection, name: str) -> bool:
    """Whether this host's ranks are started without ssh."""
    return launch.launcher == "mpi" and reachability.is_here(name)


def watchdog_address(recipe: Recipe, names: Sequence[str]) -> str:
    """The address at which the ranks reach the watchdog of this process."""
    if recipe.launch.launcher != "slurm" and not recipe.launch.hostfile:
        return "127.0.0.1"
    others = [name for name in names if not reachability.is_here(name)]
    return (others and address_towards(others[0])) or socket.gethostname()


def programs(launch: LaunchSection) -> list[str]:
    """The programs that must be installed for this launcher."""
    if launch.launcher == "slurm":
        return ["srun"]
    needed = ["ssh"] if launch.hostfile else []
    if launch.launcher == "mpi":
        return [*needed, "mpirun"]
    if launch.hostfile:
        by_mpi = launch.launcher == "deepspeed" and launch.multinode == "openmpi"
        return [*needed, "mpirun", "ompi_info"] if by_mpi else [*needed, "pdsh"]
    return []


def check_programs(launch: LaunchSection) -> None:
    """Raises UserError: a program of this launcher is not installed."""
    for program in programs(launch):
        if shutil.which(program) is None:
            raise UserError(f"launch.launcher: {launch.launcher} needs the program {program}, which is not installed")
