"""Checks that Slurm can run a recipe: its programs, the partition and its nodes, and sbatch's own test."""

import getpass
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.jobs import sbatch_options
from launcher.ways import reachability
from sparse_zero.recipe.launch import LaunchSection, SlurmOptions

TIMEOUT_SECONDS = 30.0
"""A healthy controller answers sooner."""
PROGRAMS = ("sbatch", "srun", "sinfo", "squeue", "scontrol")
USABLE_STATES = ("idle", "mix", "mixed", "alloc", "allocated", "comp", "completing", "resv", "reserved")


@dataclass(frozen=True)
class Partition:
    """A Slurm partition, from the output of sinfo."""

    name: str
    is_default: bool
    is_up: bool
    time_limit: int | None
    """Seconds; None: unlimited."""
    nodes: dict[str, int]
    """The number of nodes in each state."""
    gres: str
    """The generic resources of one node, in Slurm's notation: gpu:h100:8."""

    @property
    def usable_nodes(self) -> int:
        return sum(count for state, count in self.nodes.items() if state.rstrip("*~#%$@+^!-") in USABLE_STATES)


def is_installed() -> bool:
    """Whether this machine has Slurm's programs."""
    return shutil.which("sbatch") is not None


def check(launch: LaunchSection | None) -> list[Finding]:
    """Check Slurm. Args: launch: of a recipe that Slurm is to run; None: only report the state of the partitions."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        remedy = "start from a login node, or install Slurm's client programs (apt-get install slurm-client)"
        message = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed on this machine"
        return [error("slurm", message, remedy)]
    shown = reachability.run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%t|%G"], TIMEOUT_SECONDS)
    if shown.returncode:
        report_as = warning if launch is None else error
        first = [*shown.stderr.strip().splitlines(), "no answer"][0]
        message = f"Slurm is installed, but sinfo fails: {first}"
        return [report_as("slurm", message, "check SLURM_CONF, and that slurmctld runs")]
    partitions = parse_sinfo(shown.stdout)
    if launch is None:
        return [*describe_partitions(partitions)]
    return [*check_partitions(partitions, launch), *_check_account(launch.slurm)]


def parse_sinfo(text: str) -> list[Partition]:
    """Parse `sinfo --noheader --format=%P|%a|%l|%D|%t|%G`: a line for each partition, state and kind of node."""
    partitions: dict[str, Partition] = {}
    for line in filter(str.strip, text.splitlines()):
        name, availability, limit, count, state, gres = line.strip().split("|")
        known = partitions.get(name.rstrip("*"))
        partitions[name.rstrip("*")] = Partition(
            name=name.rstrip("*"),
            is_default=name.endswith("*"),
            is_up=availability == "up",
            time_limit=sbatch_options.time_limit_seconds(limit),
            nodes={**(known.nodes if known else {}), state: (known.nodes if known else {}).get(state, 0) + int(count)},
            gres=known.gres if known and known.gres else "" if gres == "(null)" else gres,
        )
    return list(partitions.values())


def describe_partitions(partitions: Sequence[Partition]) -> Iterator[Finding]:
    """The state of all partitions."""
    for each in partitions:
        states = ", ".join(f"{count} {state}" for state, count in each.nodes.items())
        name = f"partition {each.name}{' (default)' if each.is_default else ''}"
        gres = f", {each.gres} each" if each.gres else ""
        if each.is_up and each.usable_nodes:
            yield ok("slurm", f"{name}: {states}{gres}")
        else:
            why = "" if each.is_up else " is not up"
            remedy = f"see sinfo --list-reasons --partition={each.name}"
            yield warning("slurm", f"{name}{why}: {states}{gres}", remedy)


def check_partitions(partitions: Sequence[Partition], launch: LaunchSection) -> Iterator[Finding]:
    """Check that the recipe's partition, or the default one, can run it."""
    options = launch.slurm
    requested = options.get("partition")
    names = [each.name for each in partitions]
    chosen = [
        each for each in partitions if (each.name in str(requested).split(",") if requested else each.is_default)
    ]
    if not chosen:
        what = f"launch.slurm.partition: there is no '{requested}'" if requested else "no partition is the default"
        yield error("slurm", what, f"use one of {', '.join(names)}")
        return
    for each in chosen:
        problems = [*_partition_problems(each, launch)]
        yield from problems
        if not problems:
            limit = "" if each.time_limit is None else f", at most {each.time_limit / 3600:g} h"
            yield ok("slurm", f"partition {each.name} is up, {each.usable_nodes} usable nodes{limit}")


def _partition_problems(partition: Partition, launch: LaunchSection) -> Iterator[Finding]:
    name, total = partition.name, sum(partition.nodes.values())
    nodes = 1 if launch.nodes == "auto" else launch.nodes
    if not partition.is_up:
        yield error("slurm", f"partition {name} is not up", f"see scontrol show partition {name}")
    if nodes > total:
        message = f"launch.nodes: {nodes}, but partition {name} has {total} nodes"
        yield error("slurm", message, f"request {total} or fewer")
    elif nodes > partition.usable_nodes:
        states = ", ".join(f"{count} {state}" for state, count in partition.nodes.items())
        usable = partition.usable_nodes
        yield warning(
            "slurm",
            f"launch.nodes: {nodes}, but partition {name} has only {usable} usable nodes ({states})",
            f"see sinfo --list-reasons --partition={name}; the job waits until the other nodes are back",
        )
    limit = launch.slurm.get("time")
    requested_seconds = sbatch_options.time_limit_seconds(str(limit or ""))
    if requested_seconds and partition.time_limit and requested_seconds > partition.time_limit:
        remedy = f"request less time and continue with --resume, or use a partition other than {name}"
        hours = f"{partition.time_limit / 3600:g} h"
        yield error("slurm", f"launch.slurm.time: {limit} is more than the {hours} of partition {name}", remedy)
    requested = str(launch.slurm.get("gres") or "")
    if requested and not _has_gres(partition.gres, requested):
        message = f"launch.slurm.gres: {requested}, but a node of partition {name} has {partition.gres or 'no gres'}"
        yield error("slurm", message, "request less, or use another partition")


def _has_gres(available: str, requested: str) -> bool:
    """Whether a node has the requested resources. Args: available: as in gpu:h100:8(S:0-1); requested: as in gpu:2."""
    has = [re.sub(r"\(.*?\)", "", entry).split(":") for entry in available.split(",") if entry]
    for entry in requested.split(","):
        name, *middle = entry.split(":")
        count = int(middle.pop()) if middle and middle[-1].isdigit() else 1
        fitting = [h for h in has if h[0] == name and (not middle or h[1:2] == middle)]
        if sum(int(h[-1]) if h[-1].isdigit() else 1 for h in fitting) < count:
            return False
    return True


def _check_account(options: SlurmOptions) -> Iterator[Finding]:
    """Checks the account if Slurm has accounting; without it Slurm accepts any name."""
    requested = options.get("account")
    if not requested or shutil.which("sacctmgr") is None:
        return
    shown = reachability.run(
        ["sacctmgr", "-nP", "show", "associations", f"user={getpass.getuser()}", "format=account"], TIMEOUT_SECONDS
    )
    known = sorted(set(shown.stdout.split()))
    if shown.returncode == 0 and known and requested not in known:
        message = f"launch.slurm.account: '{requested}' is not one of your accounts"
        yield error("slurm", message, f"use one of {', '.join(known)}")


def check_submission(script: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Test a batch script with `sbatch --test-only`, which does not queue it.

    Args: script: the text of the script; environment: of sbatch.
    """
    done = reachability.run(["sbatch", "--test-only"], TIMEOUT_SECONDS, script, environment)
    # sbatch prints to stderr in either case.
    lines = [line.partition(": ")[2] or line for line in done.stderr.strip().splitlines()]
    if done.returncode:
        remedy = "correct launch.slurm, launch.nodes or launch.processes_per_node"
        yield error("slurm", f"sbatch rejects the job: {lines[-1] if lines else 'no reason given'}", remedy)
    else:
        yield ok("slurm", f"sbatch accepts the job{f': {lines[-1]}' if lines else ''}")
