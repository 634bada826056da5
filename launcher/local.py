"""The command that starts a recipe's ranks on this machine, through DeepSpeed's runner or torchrun."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import devices
from sparse_zero.recipe import Recipe

TRAINING_MODULE = "sparse_zero.train"


@dataclass(frozen=True)
class Command:
    """A command line, and what it changes in this process's environment (None: the variable is removed)."""

    argv: list[str]
    environment: dict[str, str | None]

    def shell(self) -> str:
        """The same as one line for a shell."""
        removed = [word for name, value in self.environment.items() if value is None for word in ("-u", name)]
        assigned = [f"{name}={value}" for name, value in self.environment.items() if value is not None]
        return shlex.join([*(["env", *removed] if removed else []), *assigned, *self.argv])

    def environ(self) -> dict[str, str]:
        """The whole environment of the command."""
        changed = {**os.environ, **self.environment}
        return {name: value for name, value in changed.items() if value is not None}


def training_command(
    recipe: Recipe, path: str, overrides: Sequence[str] = (), merge: bool = False, resume: str | None = None
) -> Command:
    """What starts `recipe`, which was read from `path` with `overrides`.

    Raises UserError: more ranks than accelerators, devices that the launcher cannot address.
    """
    accelerators = 0 if recipe.training.get("use_cpu") else devices.count_accelerators()
    ranks = devices.count_ranks(recipe.launch.processes_per_node, accelerators)
    options = [*(["--merge"] if merge else []), *([f"--resume={resume}"] if resume else [])]
    training = [TRAINING_MODULE, path, *overrides, *options]
    build = _deepspeed if recipe.launch.launcher == "deepspeed" else _torchrun
    command = build(ranks, accelerators, recipe.launch.master_port, training)
    if ranks > 1 and not accelerators and "OMP_NUM_THREADS" not in os.environ:
        # Every rank's torch would otherwise start a thread for each core, and the ranks would fight for them.
        command.environment["OMP_NUM_THREADS"] = str(max(1, devices.usable_cores() // ranks))
    return command


def _deepspeed(ranks: int, accelerators: int, port: int | str, training: list[str]) -> Command:
    script = Path(sys.executable).with_name("deepspeed")
    runner = [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
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
    return Command(
        argv=[
            *runner,
            *where,
            *("--master_port", str(devices.free_port() if port == "auto" else port)),
            # The default, /job/hostfile, would send the ranks to the hosts that a cluster's scheduler lists there.
            *("--hostfile", os.devnull),
            # "error" still prints a line for a rank that ends with an error, which the rank has reported itself.
            *("--log_level", "critical"),
            "--module",
            *training,
        ],
        environment=environment,
    )


def _torchrun(ranks: int, accelerators: int, port: int | str, training: list[str]) -> Command:
    meeting = ["--standalone"] if port == "auto" else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    argv = [sys.executable, "-m", "launcher.torchrun", *meeting, "--nproc-per-node", str(ranks), "-m", *training]
    return Command(argv=argv, environment={})
