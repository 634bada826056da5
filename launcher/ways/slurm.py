"""The `srun` command that starts a recipe's ranks: on the nodes of the current job, or in a job of its own."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from launcher.ways.command import SAFE_PATH, Command, private_variables, wrapped
from launcher.ways.local import threads_per_rank
from sparse_zero.recipe.launch import LaunchSection, SlurmOptions


def slurm_command(
    launch: LaunchSection,
    words: Sequence[str],
    use_cpu: bool = False,
    watch: str | None = None,
    nodes: Sequence[str] = (),
) -> Command:
    """The command that starts `python -m words[0] words[1:]` as every task of a step.

    Args:
        nodes: the nodes of the job to use; empty: all.
    """
    job = os.environ if "SLURM_JOB_ID" in os.environ else {}
    count = len(nodes) if nodes else int(job.get("SLURM_JOB_NUM_NODES", 0)) or 1
    if not nodes and launch.nodes != "auto":
        count = int(launch.nodes)
    per_node = ranks_per_node(launch, job)
    argv = ["srun", "--nodes", str(count), "--ntasks", str(count * per_node), "--ntasks-per-node", str(per_node)]
    if nodes:
        argv += ["--nodelist", ",".join(nodes)]
    # Ends the step when a rank fails, even if that rank had no time to tell the others.
    argv.append("--kill-on-bad-exit=1")
    if job:
        # Since Slurm 22.05 srun does not inherit it from the job.
        if job.get("SLURM_CPUS_PER_TASK"):
            argv.append(f"--cpus-per-task={job['SLURM_CPUS_PER_TASK']}")
    else:
        argv += option_words(launch.slurm)
    argv += [*launch.launcher_args, *wrapped([sys.executable, "-u", "-m", *words], launch)]
    private = private_variables(launch, watch)
    environment: dict[str, str | None] = dict(SAFE_PATH)
    if use_cpu and per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = job.get("SLURM_CPUS_PER_TASK") or threads_per_rank(per_node)
    environment = {name: value for name, value in environment.items() if name not in private}
    if launch.master_port != "auto":
        environment["MASTER_PORT"] = str(launch.master_port)
    if launch.master_addr:
        environment["MASTER_ADDR"] = launch.master_addr
    private = {name: value for name, value in private.items() if name not in environment}
    return Command(argv, environment, world_size=count * per_node, private=private)


def ranks_per_node(launch: LaunchSection, job: Mapping[str, str]) -> int:
    """`launch.processes_per_node`; auto: one for each GPU of a node, else the job's tasks per node, else one."""
    if launch.processes_per_node != "auto":
        return int(launch.processes_per_node)
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE"):
        if job.get(name, "").isdigit() and int(job[name]) > 0:
            return int(job[name])
    return 1


def option_words(options: SlurmOptions, write: Callable[[str, str], str] = lambda name, value: value) -> list[str]:
    """Options as command-line words: true is a flag, false and null are left out.

    Args:
        write: (name, value) -> the value as written.
    """
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:  # --mem=0 is all memory of a node
            words.append(f"--{name}={write(name, str(value))}")
    return words
