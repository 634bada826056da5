"""Whether Slurm would run a recipe: its programs, the partition and its nodes, and what its controller says."""

import getpass
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.jobs import sbatch_options
from launcher.ways import reachability
from sparse_zero.recipe.launch import LaunchSection, SlurmOptions

SECONDS = 30.0
"""A controller that takes longer is not well."""
PROGRAMS = ("sbatch", "srun", "sinfo", "squeue", "scontrol")
USABLE = ("idle", "mix", "mixed", "alloc", "allocated", "comp", "completing", "resv", "reserved")


@dataclass(frozen=True)
class Partition:
    """One partition, as sinfo shows it."""

    name: str
    is_default: bool
    is_up: bool
    time_limit: int | None
    """Seconds; None: unlimited."""
    nodes: dict[str, int]
    """How many are in each state."""
    gres: str
    """What one of its nodes has, as Slurm writes it: gpu:h100:8."""

    @property
    def usable_nodes(self) -> int:
        return sum(count for state, count in self.nodes.items() if state.rstrip("*~#%$@+^!-") in USABLE)


def is_there() -> bool:
    """Whether this machine has Slurm's programs."""
    return shutil.which("sbatch") is not None


def check(launch: LaunchSection | None) -> list[Finding]:
    """Findings about Slurm. Args: launch: of a recipe that Slurm is to run; None: about its partitions as they are."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        cure = "start from a login node, or install Slurm's client (apt-get install slurm-client)"
        return [error("slurm", f"no {', '.join(missing)} here", cure)]
    shown = reachability.run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%t|%G"], SECONDS)
    if shown.returncode:
        say = warning if launch is None else error
        last = [*shown.stderr.strip().splitlines(), "no answer"][0]
        return [say("slurm", f"its programs are here, but sinfo fails: {last}", "see SLURM_CONF and slurmctld")]
    partitions = read_partitions(shown.stdout)
    if launch is None:
        return [*describe(partitions)]
    return [*fits(partitions, launch), *_account(launch.slurm)]


def read_partitions(text: str) -> list[Partition]:
    """Of `sinfo --noheader --format=%P|%a|%l|%D|%t|%G`: a line for each partition, state and kind of node."""
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


def describe(partitions: Sequence[Partition]) -> Iterator[Finding]:
    """The partitions as they are."""
    for each in partitions:
        states = ", ".join(f"{count} {state}" for state, count in each.nodes.items())
        name = f"partition {each.name}{' (default)' if each.is_default else ''}"
        gres = f", {each.gres} each" if each.gres else ""
        if each.is_up and each.usable_nodes:
            yield ok("slurm", f"{name}: {states}{gres}")
        else:
            why = "" if each.is_up else " is not up"
            yield warning("slurm", f"{name}{why}: {states}{gres}", f"see sinfo --list-reasons --partition={each.name}")


def fits(partitions: Sequence[Partition], launch: LaunchSection) -> Iterator[Finding]:
    """Whether the partition that the recipe asks for can run it."""
    options = launch.slurm
    asked = options.get("partition")
    names = [each.name for each in partitions]
    chosen = [each for each in partitions if (each.name in str(asked).split(",") if asked else each.is_default)]
    if not chosen:
        what = f"launch.slurm.partition: there is no '{asked}'" if asked else "no partition is the default"
        yield error("slurm", what, f"choose one of {', '.join(names)}")
        return
    for each in chosen:
        problems = [*_misfits(each, launch)]
        yield from problems
        if not problems:
            limit = "" if each.time_limit is None else f", at most {each.time_limit / 3600:g} h"
            yield ok("slurm", f"partition {each.name} is up, {each.usable_nodes} usable nodes{limit}")


def _misfits(partition: Partition, launch: LaunchSection) -> Iterator[Finding]:
    name, total = partition.name, sum(partition.nodes.values())
    nodes = 1 if launch.nodes == "auto" else launch.nodes
    if not partition.is_up:
        yield error("slurm", f"partition {name} is not up", f"see scontrol show partition {name}")
    if nodes > total:
        yield error("slurm", f"launch.nodes: {nodes}, but partition {name} has {total}", f"ask for {total} or fewer")
    elif nodes > partition.usable_nodes:
        states = ", ".join(f"{count} {state}" for state, count in partition.nodes.items())
        cure = f"see sinfo --list-reasons --partition={name}; until they are back the job waits"
        yield warning(
            "slurm",
            f"launch.nodes: {nodes}, but of partition {name} are usable {partition.usable_nodes} ({states})",
            cure,
        )
    limit = launch.slurm.get("time")
    wanted_seconds = sbatch_options.time_limit_seconds(str(limit or ""))
    if wanted_seconds and partition.time_limit and wanted_seconds > partition.time_limit:
        cure = f"ask for less (checkpoints and --resume go on), or another partition than {name}"
        hours = f"{partition.time_limit / 3600:g} h"
        yield error("slurm", f"launch.slurm.time: {limit} is more than the {hours} of partition {name}", cure)
    wanted = str(launch.slurm.get("gres") or "")
    if wanted and not _has_gres(partition.gres, wanted):
        there = partition.gres or "nothing of the kind"
        yield error(
            "slurm", f"launch.slurm.gres: {wanted}, but a node of partition {name} has {there}", "ask for less"
        )


def _has_gres(there: str, wanted: str) -> bool:
    """gpu:2 or gpu:h100:2 in what a node has, gpu:h100:8(S:0-1)."""
    has = [re.sub(r"\(.*?\)", "", entry).split(":") for entry in there.split(",") if entry]
    for entry in wanted.split(","):
        name, *middle = entry.split(":")
        count = int(middle.pop()) if middle and middle[-1].isdigit() else 1
        fitting = [h for h in has if h[0] == name and (not middle or h[1:2] == middle)]
        if sum(int(h[-1]) if h[-1].isdigit() else 1 for h in fitting) < count:
            return False
    return True


def _account(options: SlurmOptions) -> Iterator[Finding]:
    """Only where Slurm keeps accounts; else any name does."""
    asked = options.get("account")
    if not asked or shutil.which("sacctmgr") is None:
        return
    shown = reachability.run(
        ["sacctmgr", "-nP", "show", "associations", f"user={getpass.getuser()}", "format=account"], SECONDS
    )
    known = sorted(set(shown.stdout.split()))
    if shown.returncode == 0 and known and asked not in known:
        yield error("slurm", f"launch.slurm.account: '{asked}' is not yours", f"choose one of {', '.join(known)}")


def trial(script: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What the controller itself says to a batch script, without queueing it."""
    done = reachability.run(["sbatch", "--test-only"], SECONDS, script, environment)
    # It talks on stderr in either case.
    said = [line.partition(": ")[2] or line for line in done.stderr.strip().splitlines()]
    if done.returncode:
        cure = "correct launch.slurm, launch.nodes or launch.processes_per_node"
        yield error("slurm", f"sbatch refuses such a job: {said[-1] if said else 'no reason given'}", cure)
    else:
        yield ok("slurm", f"sbatch would take it: {said[-1] if said else 'yes'}")
