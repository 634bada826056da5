"""Commands that start ranks on this machine: with DeepSpeed's runner, with torchrun, or directly."""

import os
import sys
from pathlib import Path

from launcher.ways import devices
from launcher.ways.command import ONE_MACHINE, SAFE_PATH, Command, private_variables, wrapped
from sparse_zero.ranks.network import free_port
from sparse_zero.recipe.launch import LaunchSection


def local_command(launch: LaunchSection, words: list[str], use_cpu: bool, watch: str | None = None) -> Command:
    """The command that starts `python -m words[0] words[1:]` on every rank of this machine.

    Raises:
        UserError: there are fewer accelerators than ranks, or the launcher cannot address the visible devices.
    """
    accelerators = 0 if use_cpu else devices.count_accelerators()
    ranks = devices.count_ranks(launch.processes_per_node, accelerators)
    build = {"deepspeed": _deepspeed, "torchrun": _torchrun, "local": _direct}[launch.launcher]
    command = build(ranks, accelerators, launch, words)
    private = private_variables(launch, watch)
    environment = {**command.environment, **SAFE_PATH}
    if ranks > 1 and not accelerators and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = threads_per_rank(ranks)
    environment = {name: value for name, value in environment.items() if name not in private}
    return Command(wrapped(command.argv, launch), environment, world_size=ranks, private=private)


def threads_per_rank(ranks: int) -> str:
    """OMP_NUM_THREADS for ranks that share this machine's cores; by default each rank starts one thread per core."""
    return str(max(1, devices.usable_cores() // ranks))


def deepspeed_runner() -> list[str]:
    """The `deepspeed` program of this environment."""
    script = Path(sys.executable).with_name("deepspeed")
    return [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]


def _deepspeed(ranks: int, accelerators: int, launch: LaunchSection, words: list[str]) -> Command:
    environment: dict[str, str | None] = {}
    where = ["--num_gpus", str(ranks)]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        # With --num_gpus the runner ignores this variable and uses the machine's first GPUs.
        environment["CUDA_VISIBLE_DEVICES"] = None
        if accelerators:
            numbers = devices.visible_device_numbers(ranks)
            where = ["--include", f"localhost:{','.join(map(str, numbers))}"]
    if not accelerators and "DS_ACCELERATOR" not in os.environ:
        # Without it, every process prints a warning that there is no GPU.
        environment["DS_ACCELERATOR"] = "cpu"
    argv = [
        *deepspeed_runner(),
        *where,
        *("--master_port", str(choose_port(launch))),
        # By default the runner starts ranks on the hosts listed in /job/hostfile, which some clusters write.
        *("--hostfile", os.devnull),
        # At level "error" it prints a line for each rank that fails; the rank has reported its error itself.
        *("--log_level", "critical"),
        "--module",
        *words,
    ]
    return Command(argv, environment)


def _torchrun(ranks: int, accelerators: int, launch: LaunchSection, words: list[str]) -> Command:
    return Command([*torchrun_here(ranks, choose_port(launch)), *launch.launcher_args, "-m", *words])


def torchrun_here(ranks: int, port: int) -> list[str]:
    """The command of a single agent. Args: port: of rank 0's store."""
    # With --standalone, the agent would serve a store without authentication on all interfaces.
    rendezvous = ["--rdzv-backend", ONE_MACHINE, "--rdzv-endpoint", f"127.0.0.1:{port}"]
    return [sys.executable, "-m", "launcher.ways.torchrun", *rendezvous, "--nproc-per-node", str(ranks)]


def _direct(ranks: int, accelerators: int, launch: LaunchSection, words: list[str]) -> Command:
    port = ["--master-port", str(choose_port(launch))]
    argv = [sys.executable, "-m", "launcher.ways.local_ranks", "--processes", str(ranks), *port, "-m", *words]
    return Command(argv)


def choose_port(launch: LaunchSection) -> int:
    """`launch.master_port`; auto: a free port of this machine."""
    return free_port() if launch.master_port == "auto" else int(launch.master_port)
