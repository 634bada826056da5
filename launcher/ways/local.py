"""The commands that start ranks on this machine: through DeepSpeed's runner, torchrun, or nothing at all."""

import os
import sys
from pathlib import Path

from launcher.ways import devices
from launcher.ways.command import Command, rank_environment, wrapped
from sparse_zero.ranks.network import free_port
from sparse_zero.recipe.launch import LaunchSection


def local_command(launch: LaunchSection, words: list[str], use_cpu: bool, watch: str | None = None) -> Command:
    """What starts `python -m words[0] words[1:]` on every rank of this machine.

    Raises UserError: more ranks than accelerators, devices that the launcher cannot address.
    """
    accelerators = 0 if use_cpu else devices.count_accelerators()
    ranks = devices.count_ranks(launch.processes_per_node, accelerators)
    build = {"deepspeed": _deepspeed, "torchrun": _torchrun, "local": _plain}[launch.launcher]
    command = build(ranks, accelerators, launch, words)
    command.environment.update(rank_environment(launch, watch))
    if ranks > 1 and not accelerators and "OMP_NUM_THREADS" not in {**os.environ, **command.environment}:
        command.environment["OMP_NUM_THREADS"] = threads_per_rank(ranks)
    return Command(wrapped(command.argv, launch), command.environment, world_size=ranks)


def threads_per_rank(ranks: int) -> str:
    """Every rank's torch would otherwise start a thread for each core, and the ranks would fight for them."""
    return str(max(1, devices.usable_cores() // ranks))


def deepspeed_runner() -> list[str]:
    script = Path(sys.executable).with_name("deepspeed")
    return [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]


def _deepspeed(ranks: int, accelerators: int, launch: LaunchSection, words: list[str]) -> Command:
    environment: dict[str, str | None] = {}
    where = ["--num_gpus", str(ranks)]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        # Given --num_gpus, the runner drops this variable and takes the first GPUs of the machine.
        environment["CUDA_VISIBLE_DEVICES"] = None
        if accelerators:
            numbers = devices.visible_device_numbers(ranks)
            where = ["--include", f"localhost:{','.join(map(str, numbers))}"]
    if not accelerators and "DS_ACCELERATOR" not in os.environ:
        # Left to detect it, every process prints a warning that there is no GPU.
        environment["DS_ACCELERATOR"] = "cpu"
    argv = [
        *deepspeed_runner(),
        *where,
        *("--master_port", str(settle_port(launch))),
        # The default, /job/hostfile, would send the ranks to the hosts that a cluster's scheduler lists there.
        *("--hostfile", os.devnull),
        # "error" still prints a line for a rank that ends with an error, which the rank has reported itself.
        *("--log_level", "critical"),
        "--module",
        *words,
    ]
    return Command(argv, environment)


def _torchrun(ranks: int, accelerators: int, launch: LaunchSection, words: list[str]) -> Command:
    port = launch.master_port
    meeting = ["--standalone"] if port == "auto" else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    torchrun = [sys.executable, "-m", "launcher.ways.torchrun", *meeting, "--nproc-per-node", str(ranks)]
    return Command([*torchrun, *launch.launcher_args, "-m", *words])


def _plain(ranks: int, accelerators: int, launch: LaunchSection, words: list[str]) -> Command:
    port = ["--master-port", str(settle_port(launch))]
    argv = [sys.executable, "-m", "launcher.ways.local_ranks", "--processes", str(ranks), *port, "-m", *words]
    return Command(argv)


def settle_port(launch: LaunchSection) -> int:
    """A free port of this machine where the recipe leaves the choice."""
    return free_port() if launch.master_port == "auto" else int(launch.master_port)
