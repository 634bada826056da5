"""The options of sbatch that a submitted job gets, from the command line, the recipe and our defaults.

Options are dicts from long names without dashes to values, in the order of the script. Pure functions.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparse_zero.errors import UserError
from sparse_zero.recipe.names import is_option

if TYPE_CHECKING:
    from sparse_zero.recipe.launch import SlurmOptions

OWN = ("help", "json", "merge", "dry-run")
"""Options of `sparse-zero submit` itself, which sbatch does not get."""

FLAGS = (
    *("contiguous", "disable-stdout-job-summary", "exclusive", "get-user-env", "hold", "ignore-pbs"),
    *("nice", "no-kill", "no-requeue", "overcommit", "oversubscribe", "propagate", "reboot", "requeue"),
    *("spread-job", "use-min-nodes"),
)
"""Options of sbatch without a value, or whose optional value needs `=`."""

REFUSED = {
    "array": "all its tasks would be this one run; for a sweep: sparse-zero recipes copy array.sbatch",
    "wrap": "the job runs a script that sparse-zero writes",
    "wait": "the job may be requeued several times; use squeue",
    "test-only": "it would submit nothing; use --dry-run",
    "parsable": "use --json",
    "resume": "a submitted run always resumes from its newest checkpoint, if there is one",
    "reset": "a job that is queued again would reset it again; use sparse-zero train --resume --reset",
}

WARNING_SECONDS = 120
"""How long before the time limit the run gets the signal to save. Slurm may send it 30 seconds earlier."""

CPUS_PER_GPU_RANK = 4
"""Slurm's default is one core, which the rank, its data loader and the communication threads would share."""


def split_words(words: Sequence[str]) -> "tuple[SlurmOptions, list[str]]":
    """Split the command line of `sparse-zero submit` into options of sbatch and the other words. A flag is true.

    Raises:
        UserError: a short option, an override with dashes, or a name that no option has.
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
            raise UserError(f"{word}: use the long names of sbatch's options, as in --partition NAME")
        elif equals and "." in name:
            raise UserError(f"{word}: write an override without dashes: {word.lstrip('-')}")
        elif not is_option(name):
            raise UserError(f"{word!r}: no option of sbatch has such a name; write --NAME=VALUE")
        elif equals:
            options[name] = value
        elif name in FLAGS or not rest or rest[0].startswith("--"):
            options[name] = True
        else:
            options[name] = rest.pop(0)
    return options, others


def job_options(
    defaults: Mapping[str, object],
    recipe: "SlurmOptions",
    given: "SlurmOptions",
    processes_per_node: int | str,
    cpu: bool,
) -> "SlurmOptions":
    """All options of the script. Those of the command line override the recipe's, which override the defaults.

    Args:
        given: the options of the command line.
        processes_per_node: of the recipe's launch section; becomes the number of tasks on each node.
        cpu: whether the run trains on the CPU.

    Raises:
        UserError: a submitted run cannot have an option, or a node has fewer GPUs than ranks.
    """
    asked = {name.replace("_", "-"): value for name, value in {**recipe, **given}.items()}
    for name, reason in REFUSED.items():
        if asked.get(name) not in (None, False):
            raise UserError(f"--{name}: not available for a submitted run: {reason}")
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


def gpus_per_node(options: "SlurmOptions") -> int | None:
    """The number of GPUs that `options` request on each node; None if they request none.

    Raises:
        UserError: `gpus`, the number for the whole job, is not a multiple of the number of nodes.
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
            raise UserError(f"--gpus: {total} cannot be split evenly over {nodes} nodes; give --gpus-per-node")
        return total // int(nodes)
    return None


def _nodes(options: "SlurmOptions") -> str:
    return str(options.get("nodes") or 1)


def _count(entries: Sequence[str]) -> int:
    """The sum of `2`, `a100:2`, `a100` (one) and the empty string (one)."""
    numbers = [entry.rpartition(":")[2] for entry in entries]
    return sum(int(number) if number.isdigit() else 1 for number in numbers)


def _tasks_per_node(options: "SlurmOptions", processes_per_node: int | str, gpus: int | None) -> int:
    if processes_per_node != "auto":
        if gpus is not None and int(processes_per_node) > gpus:
            raise UserError(
                f"launch.processes_per_node: {processes_per_node} ranks need as many GPUs, the job requests {gpus} on "
                f"each node; request more, or train on the CPU with training.use_cpu=true"
            )
        return int(processes_per_node)
    if options.get("ntasks"):
        total, nodes = str(options["ntasks"]), _nodes(options)
        if not (total.isdigit() and nodes.isdigit()) or int(total) % int(nodes):
            raise UserError(f"--ntasks: {total} cannot be split evenly over {nodes} nodes; give --ntasks-per-node")
        return int(total) // int(nodes)
    return gpus or 1


def _check_time(options: "SlurmOptions") -> None:
    limit = time_limit_seconds(str(options.get("time") or ""))
    warning = re.search(r"@(\d+)$", str(options.get("signal") or ""))
    if limit is None or warning is None:
        return
    if limit <= int(warning[1]) + 30:
        raise UserError(
            f"--time: {limit} seconds leave no time to train: the run gets the signal to stop {warning[1]} to "
            f"{int(warning[1]) + 30} seconds before the end; give more time, or fewer seconds in "
            f"--signal={options['signal']}"
        )


def time_limit_seconds(limit: str) -> int | None:
    """The seconds of a Slurm time limit; None for anything else, such as UNLIMITED.

    Args:
        limit: `minutes`, `minutes:seconds`, `hours:minutes:seconds` or `days-hours[:minutes[:seconds]]`.
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


def log_path(options: "SlurmOptions", job: str) -> str:
    """sbatch's `output` pattern, filled in for a job's number."""
    known = {"%": "%", "j": job, "x": str(options.get("job-name", ""))}
    return re.sub("%(.)", lambda place: known.get(place[1], place[0]), str(options["output"]))
