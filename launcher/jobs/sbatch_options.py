"""Options of sbatch: of a command line, from a recipe, and what `sparse-zero submit` adds to them.

All are held by their long names without dashes, in the order in which a script has them. Pure functions.
"""

import re
from collections.abc import Mapping, Sequence

from sparse_zero.errors import UserError
from sparse_zero.recipe.launch import SlurmOptions

OWN = ("help", "json", "merge", "dry-run")
"""Options of `sparse-zero submit` that are not sbatch's, or not passed on."""

FLAGS = (
    *("contiguous", "disable-stdout-job-summary", "exclusive", "get-user-env", "hold", "ignore-pbs"),
    *("nice", "no-kill", "no-requeue", "overcommit", "oversubscribe", "propagate", "reboot", "requeue"),
    *("spread-job", "use-min-nodes"),
)
"""sbatch's options that take no value, or only one written with `=`."""

REFUSED = {
    "array": "its tasks would all be this one run; for a sweep, see array.sbatch (`sparse-zero recipes`)",
    "wrap": "the job runs a script of its own",
    "wait": "the job may end and be queued again several times; ask squeue",
    "test-only": "nothing would be submitted; --dry-run shows what would",
    "parsable": "--json prints what a program can read",
    "resume": "a submitted run always goes on from its newest checkpoint, should there be one",
}

WARNING_SECONDS = 120
"""How long before the time limit a run is told to save. Slurm looks every 30 seconds, and may be that much earlier."""

CPUS_PER_GPU_RANK = 4
"""Slurm's default is a single core, which the rank, its data loader and the network's threads would share."""


def split_words(words: Sequence[str]) -> tuple[SlurmOptions, list[str]]:
    """sbatch's options of a command line of `sparse-zero submit`, and its other words. A flag has the value true.

    Raises UserError: a short option, an override with dashes.
    """
    options: SlurmOptions = {}
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("-") or word == "-h" or name in OWN:
            others.append(word)
        elif not word.startswith("--"):
            raise UserError(f"{word}: give options of sbatch by their long names, as in --partition NAME")
        elif equals and "." in name:
            raise UserError(f"{word}: an override has no dashes: {word.lstrip('-')}")
        elif equals:
            options[name] = value
        elif name in FLAGS or not rest or rest[0].startswith("--"):
            options[name] = True
        else:
            options[name] = rest.pop(0)
    return options, others


def job_options(
    defaults: Mapping[str, object], recipe: SlurmOptions, given: SlurmOptions, processes_per_node: int | str, cpu: bool
) -> SlurmOptions:
    """Everything that a script asks for: `given` on the command line before the recipe's before the defaults.

    Args: processes_per_node: of the recipe's launch section; the allocation holds as many tasks on each node.
    cpu: the run leaves GPUs alone.
    Raises UserError: an option that a submitted run cannot have; GPUs that are fewer than a node's ranks.
    """
    asked = {name.replace("_", "-"): value for name, value in {**recipe, **given}.items()}
    for name, reason in REFUSED.items():
        if asked.get(name) not in (None, False):
            raise UserError(f"--{name}: not for a submitted run: {reason}")
    options: SlurmOptions = {**defaults, "ntasks-per-node": None, "cpus-per-task": None}
    options |= {"signal": f"B:USR1@{WARNING_SECONDS}", "requeue": True} | asked
    if asked.get("no-requeue"):
        options["requeue"] = None
    gpus = None if cpu else gpus_per_node(options)
    if "ntasks-per-node" not in asked:
        options["ntasks-per-node"] = _tasks_per_node(options, processes_per_node, gpus)
    if gpus and not asked.keys() & {"cpus-per-task", "cpus-per-gpu"}:
        options["cpus-per-task"] = CPUS_PER_GPU_RANK
    _check_time(options)
    return {name: value for name, value in options.items() if value is not None and value is not False}


def gpus_per_node(options: SlurmOptions) -> int | None:
    """The GPUs that `options` ask for on each node; None where they do not say.

    Raises UserError: `gpus` of the whole job that are not as many for each node.
    """
    if options.get("gpus-per-node"):
        return _count(str(options["gpus-per-node"]).split(","))
    for name in ("gres", "tres-per-node"):
        entries = [re.sub(r"^gres[/:]|\(.*\)$", "", entry) for entry in str(options.get(name) or "").split(",")]
        gpus = [entry.partition(":")[2] for entry in entries if re.split("[:=]", entry)[0] == "gpu"]
        if gpus:
            return _count(gpus)
    if options.get("gpus"):
        total, nodes = _count(str(options["gpus"]).split(",")), _nodes(options)
        if not nodes.isdigit() or total % int(nodes):
            raise UserError(f"--gpus: {total} on {nodes} nodes are not as many on each; give --gpus-per-node")
        return total // int(nodes)
    return None


def _nodes(options: SlurmOptions) -> str:
    return str(options.get("nodes") or 1)


def _count(entries: Sequence[str]) -> int:
    """Of `2`, `a100:2`, `a100` (one) and nothing (one)."""
    numbers = [entry.rpartition(":")[2] for entry in entries]
    return sum(int(number) if number.isdigit() else 1 for number in numbers)


def _tasks_per_node(options: SlurmOptions, processes_per_node: int | str, gpus: int | None) -> int:
    if processes_per_node != "auto":
        if gpus is not None and int(processes_per_node) > gpus:
            raise UserError(
                f"launch.processes_per_node: {processes_per_node} ranks need as many GPUs, the job asks for {gpus} on "
                f"each node; ask for more, or train on the CPU with training.use_cpu=true"
            )
        return int(processes_per_node)
    if options.get("ntasks"):
        total, nodes = str(options["ntasks"]), _nodes(options)
        if not (total.isdigit() and nodes.isdigit()) or int(total) % int(nodes):
            raise UserError(f"--ntasks: {total} on {nodes} nodes are not as many on each; give --ntasks-per-node")
        return int(total) // int(nodes)
    return gpus or 1


def _check_time(options: SlurmOptions) -> None:
    limit, warning = seconds(str(options.get("time") or "")), re.search(r"@(\d+)$", str(options.get("signal") or ""))
    if limit is None or warning is None:
        return
    if limit <= int(warning[1]) + 30:
        raise UserError(
            f"--time: of {limit} seconds nothing is left to train in: the run is told to stop {warning[1]} seconds, "
            f"and up to 30 more, before the end; give more time, or another --signal than {options['signal']}"
        )


def seconds(limit: str) -> int | None:
    """A time limit of Slurm: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`.
    None for any other, such as UNLIMITED.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return None
    days, dash, rest = limit.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, extra = [*numbers, 0, 0][:3]
    else:
        hours, minutes, extra = [0, *numbers, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + extra


def log_path(options: SlurmOptions, job: str) -> str:
    """The file that sbatch's `output` pattern means for job `job`."""
    known = {"%": "%", "j": job, "x": str(options.get("job-name", ""))}
    return re.sub("%(.)", lambda place: known.get(place[1], place[0]), str(options["output"]))
