"""Examines what a run will need, before it waits for hours in a queue: every host, their network, Slurm, the ranks.

    diagnosis = examine(load_recipe("configs/demo.yaml"), "configs/demo.yaml")

Imports no torch: each host, this one included, answers in a process of its own.
"""

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher import agreement, asking, host_checks, links, preflight, slurm_checks, sources, surroundings
from launcher.findings import Finding, error, has_error, ok, warning
from launcher.host_checks import Wanted
from launcher.host_report import Report
from launcher.hostfile import Host, choose_hosts, read_hostfile
from sparse_zero.errors import UserError
from sparse_zero.launch_config import LaunchSection
from sparse_zero.recipe import Recipe

NEEDED_FOR_RANKS = ("accelerator", "backend", "hostfile", "launcher", "network", "port", "reach", "versions")
"""An error of these checks says already why the ranks would not meet; starting them takes minutes to say it again."""


@dataclass
class Diagnosis:
    """All that was found."""

    findings: list[Finding] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    """What the hosts said, by name."""
    measured: links.Measured | None = None
    """None: no ranks were started."""

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if has_error(self.findings) else 0

    def to_json(self) -> dict[str, Any]:
        """For --json: `errors` and `warnings` are counts; `ranks` is null where none were started."""
        counts = {f"{name}s": sum(f.severity == name for f in self.findings) for name in ("error", "warning")}
        findings = [asdict(finding) for finding in self.findings]
        ranks = asdict(self.measured) if self.measured else None
        return {**counts, "findings": findings, "hosts": self.reports, "ranks": ranks}


def examine(recipe: Recipe | None = None, path: str | None = None, with_ranks: bool = True) -> Diagnosis:
    """Examine the hosts of a recipe that was read from `path`, or without one this machine.

    Args: with_ranks: also start the ranks, to measure their links.
    """
    launch = recipe.launch if recipe else LaunchSection()
    diagnosis = Diagnosis()
    found = diagnosis.findings
    try:
        hosts = hosts_of(launch)
    except UserError as problem:
        found.append(error("hostfile", str(problem), "correct launch.hostfile, include, exclude or nodes"))
        hosts = []
    several = len(hosts) > 1
    found += surroundings.programs(launch, several)
    found += surroundings.this_machines_traps(runs_pdsh=several and launch.launcher == "deepspeed")
    found += _deepspeed_file(recipe)
    _ask_hosts(diagnosis, recipe, path, hosts)
    if recipe is None and slurm_checks.is_there():
        found += slurm_checks.check(None)
    elif launch.launcher == "slurm" and not hosts:
        found += slurm_checks.check(launch)
    if with_ranks:
        _try_ranks(diagnosis, recipe, hosts)
    return diagnosis


def hosts_of(launch: LaunchSection) -> list[Host]:
    """The hosts of a run in the order of its ranks; empty where it is this machine alone.

    Raises UserError: a hostfile or a filter that cannot be used, more nodes than it lists.
    """
    if launch.launcher == "slurm":
        return [Host(node, 0) for node in job_nodes()]
    if launch.hostfile is None:
        return []
    hosts = choose_hosts(read_hostfile(launch.hostfile), launch.include, launch.exclude)
    if launch.nodes != "auto":
        if launch.nodes > len(hosts):
            raise UserError(f"launch.nodes: {launch.nodes}, but {launch.hostfile} leaves {len(hosts)} hosts")
        hosts = hosts[: launch.nodes]
    return [] if len(hosts) == 1 and is_this_machine(hosts[0].name) else hosts


def job_nodes() -> list[str]:
    """The nodes of the Slurm job that this process is in; empty outside of one."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        return []
    return slurm_checks.run("scontrol", "show", "hostnames", nodelist).stdout.split()


def is_this_machine(name: str) -> bool:
    """Whether a hostfile's name means the machine that reads it."""
    return name in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def _deepspeed_file(recipe: Recipe | None) -> Iterator[Finding]:
    if recipe and isinstance(recipe.training.get("deepspeed"), str):
        try:
            preflight.check_json(Path(recipe.training["deepspeed"]))
        except UserError as problem:
            yield error("files", str(problem), "correct it")


def _ask_hosts(diagnosis: Diagnosis, recipe: Recipe | None, path: str | None, hosts: Sequence[Host]) -> None:
    launch = recipe.launch if recipe else LaunchSection()
    several = len(hosts) > 1
    master = (launch.master_addr or hosts[0].name) if several else None
    with _marker(recipe if several else None) as marker:
        question = question_of(recipe, path, marker, [master] if master else [])
        # The port is wanted on rank 0's host only.
        questions = [{**question, "port": None if index else question["port"]} for index in range(len(hosts) or 1)]
        names = [host.name for host in hosts] or [socket.gethostname()]
        if not hosts:
            answers = [asking.ask_here(question, launch)]
        elif launch.launcher == "slurm" and not hosts:
            answers = asking.ask_by_srun(names, {**question, "port": None}, launch)
        else:
            answers = asking.ask_by_ssh(names, questions, launch)
    found, offsets = diagnosis.findings, {}
    for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
        if answer.report is None:
            found += [answer.problem] if answer.problem else []
            continue
        if hosts:
            found.append(ok("reach", "answers", name))
        diagnosis.reports[name], offsets[name] = answer.report, answer.clock_offset
        ranks = ranks_on(launch, hosts[index] if hosts else None)
        has_ranks = bool(hosts) or launch.launcher != "slurm"
        wanted = Wanted(recipe, ranks, has_ranks, several, master)
        found += host_checks.check_host(answer.report, wanted, name)
    use_cpu = bool(recipe and recipe.training.get("use_cpu"))
    found += agreement.compare(diagnosis.reports, offsets, use_cpu)


def ranks_on(launch: LaunchSection, host: Host | None) -> int | None:
    """The ranks that a host takes; None: as many as it has accelerators, or one."""
    if launch.processes_per_node != "auto":
        return int(launch.processes_per_node)
    return host.slots or None if host else None


def question_of(recipe: Recipe | None, path: str | None, marker: Path | None, peers: Sequence[str]) -> dict[str, Any]:
    """What to ask each host; see launcher.host_report."""
    question: dict[str, Any] = {"torch": True, "port": None, "peers": list(peers)}
    if recipe is None:
        return question
    model, data, training = recipe.model, recipe.data, recipe.training
    deepspeed = [training["deepspeed"]] if isinstance(training.get("deepspeed"), str) else []
    return {
        **question,
        "port": None if recipe.launch.master_port == "auto" else recipe.launch.master_port,
        "files": [*([path] if path else []), *deepspeed],
        "sources": sources.question(model.name, model.tokenizer, data.path, data.data_files, model.revision),
        "output": str(training["output_dir"]),
        "marker": str(marker) if marker else None,
    }


@contextlib.contextmanager
def _marker(recipe: Recipe | None) -> Iterator[Path | None]:
    """A file where the run would write, for the other hosts to see; None where it cannot be written."""
    if recipe is None:
        yield None
        return
    place = sources.nearest_existing(Path(str(recipe.training["output_dir"])))
    marker = place / f".sparse-zero-doctor-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError:
        # The host's own report says that it cannot write there.
        yield None
        return
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _try_ranks(diagnosis: Diagnosis, recipe: Recipe | None, hosts: Sequence[Host]) -> None:
    found = diagnosis.findings
    if has_error(found, NEEDED_FOR_RANKS):
        found.append(warning("ranks", "not started: the errors above come first", "correct them, and ask again"))
        return
    if recipe and recipe.launch.launcher == "slurm" and not hosts:
        cure = "ask within a job: salloc --nodes=N ..., then sparse-zero doctor again; or --no-ranks"
        found.append(warning("ranks", "not started: this is no Slurm job", cure))
        return
    try:
        command = _command(recipe, next(iter(diagnosis.reports.values())))
    except UserError as problem:
        found.append(error("launcher", str(problem), "correct the recipe's launch section"))
        return
    diagnosis.measured = links.measure(command)
    found += links.judge(diagnosis.measured)


def _command(recipe: Recipe | None, report: Report) -> Any:
    """Starts the probe as the run's ranks would be started; without a recipe on all devices, or on two ranks."""
    accelerators = host_checks.accelerator_count(report, Wanted(recipe))
    if recipe is None:
        return links.command_here(accelerators or 2, use_cpu=not accelerators)
    ranks = ranks_on(recipe.launch, None) or max(1, accelerators)
    return links.command_here(ranks, use_cpu=not accelerators)
