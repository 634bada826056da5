"""Examines what a run will need, before it waits for hours in a queue: every host, their network, Slurm, the ranks.

    diagnosis = examine(load_recipe("demo.yaml"), "demo.yaml")

Each host, this one included, answers in a process of its own: a broken torch is something to be told.
"""

import contextlib
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.doctor import agreement, environment, host_checks, host_queries, inputs, links, slurm_checks
from launcher.doctor.findings import Finding, error, has_error, ok, warning
from launcher.doctor.host_checks import Wanted
from launcher.doctor.host_queries import Answer
from launcher.doctor.host_report import Report
from launcher.jobs import submit
from launcher.ways import launchers, preflight
from launcher.ways.command import Command, rank_environment
from launcher.ways.hostfile import Host
from launcher.ways.remote import hosts_of
from launcher.ways.slurm import ranks_per_node
from sparse_zero.errors import UserError
from sparse_zero.ranks.placement import address_of
from sparse_zero.recipe.launch import LaunchSection
from sparse_zero.recipe.lookup import find_recipe
from sparse_zero.recipe.recipe import Recipe

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


def examine(
    recipe: Recipe | None = None, path: str | None = None, overrides: Sequence[str] = (), with_ranks: bool = True
) -> Diagnosis:
    """Examine the hosts of a recipe that was read from `path` with `overrides`, or without one this machine.

    Args: with_ranks: also start the ranks, to measure their links.
    """
    launch = recipe.launch if recipe else LaunchSection()
    diagnosis = Diagnosis()
    found = diagnosis.findings
    found += environment.programs(launch)
    found += environment.traps(os.environ, Path.home())
    hosts: list[Host] = []
    try:
        hosts = hosts_to_ask(recipe)
    except UserError as problem:
        found.append(error("hostfile", str(problem), "correct launch.hostfile, include, exclude or nodes"))
    try:
        rank_environment(launch)
    except UserError as problem:
        found.append(error("launcher", str(problem), "correct launch.environment"))
    else:
        _ask_hosts(diagnosis, recipe, path, hosts)
    found += _deepspeed_file(recipe)
    if recipe is None and slurm_checks.is_there():
        found += slurm_checks.check(None)
    elif recipe and launch.launcher == "slurm" and not hosts:
        found += _job(recipe, path, overrides)
    _try_ranks(diagnosis, recipe, hosts, with_ranks)
    return diagnosis


def hosts_to_ask(recipe: Recipe | None) -> list[Host]:
    """The hosts of a run in the order of its ranks, with the ranks of each; empty where it is this machine alone.

    Raises UserError: a hostfile or a filter that cannot be used, fewer hosts or slots than are asked for.
    """
    if recipe is None:
        return []
    if recipe.launch.hostfile:
        return hosts_of(recipe.launch)
    return [Host(name, ranks_per_node(recipe.launch, os.environ)) for name in launchers.host_names(recipe)]


def _deepspeed_file(recipe: Recipe | None) -> Iterator[Finding]:
    if recipe and isinstance(recipe.training.get("deepspeed"), str):
        try:
            preflight.check_json(Path(recipe.training["deepspeed"]))
        except UserError as problem:
            yield error("files", str(problem), "correct it")


def _job(recipe: Recipe, path: str | None, overrides: Sequence[str]) -> list[Finding]:
    """Whether Slurm would take the job that `sparse-zero submit` would make of the recipe."""
    found = slurm_checks.check(recipe.launch)
    if path is None or any(finding.severity != "ok" for finding in found):
        return found
    try:
        job = submit.plan(recipe, path, overrides)
    except UserError as problem:
        return [*found, error("slurm", str(problem), "correct launch.slurm")]
    return [*found, *slurm_checks.trial(job.text, job.command.environ())]


def _ask_hosts(diagnosis: Diagnosis, recipe: Recipe | None, path: str | None, hosts: Sequence[Host]) -> None:
    launch = recipe.launch if recipe else LaunchSection()
    several = len(hosts) > 1
    # As the launchers do: remote.py's and Slurm's, which knows addresses of nodes that have no other name.
    master = None
    if several:
        master = launch.master_addr or (address_of(hosts[0].name) if launch.launcher == "slurm" else hosts[0].name)
    with _marker(recipe if several else None) as marker:
        # The way to rank 0 is a loop on its own host, but not the way to the last one's.
        question = question_of(recipe, path, marker, [master, hosts[-1].name] if several else [])
        answers = _answers(question, launch, hosts)
    found, offsets = diagnosis.findings, {}
    for index, (name, answer) in enumerate(answers.items()):
        if answer.report is None:
            found += [answer.problem] if answer.problem else []
            continue
        if hosts:
            found.append(ok("reach", "answers", name))
        diagnosis.reports[name], offsets[name] = answer.report, answer.clock_offset
        asked = None if launch.processes_per_node == "auto" else int(launch.processes_per_node)
        ranks = hosts[index].slots if hosts else asked
        has_ranks = bool(hosts) or launch.launcher != "slurm"
        wanted = Wanted(recipe, ranks, has_ranks, several, master)
        found += host_checks.check_host(answer.report, wanted, name)
    use_cpu = bool(recipe and recipe.training.get("use_cpu"))
    found += agreement.compare(diagnosis.reports, offsets, use_cpu)


def _answers(question: dict[str, Any], launch: LaunchSection, hosts: Sequence[Host]) -> dict[str, Answer]:
    """By host, in the order of the ranks."""
    names = [host.name for host in hosts]
    if not hosts:
        return {socket.gethostname(): host_queries.ask_here(question, launch)}
    # A port is wanted on rank 0's host only; Slurm's tasks all get the same question.
    elsewhere = {**question, "port": None}
    if launch.launcher == "slurm":
        return dict(zip(names, host_queries.ask_by_srun(names, elsewhere, launch), strict=True))
    questions = [question, *[elsewhere] * (len(hosts) - 1)]
    return dict(zip(names, host_queries.ask_by_ssh(names, questions, launch), strict=True))


def question_of(recipe: Recipe | None, path: str | None, marker: Path | None, peers: Sequence[str]) -> dict[str, Any]:
    """What to ask each host; see launcher.doctor.host_report."""
    question: dict[str, Any] = {"torch": True, "port": None, "peers": list(peers)}
    if recipe is None:
        return question
    model, data, training = recipe.model, recipe.data, recipe.training
    return {
        **question,
        "port": None if recipe.launch.master_port == "auto" else recipe.launch.master_port,
        "files": [str(file) for file in (*([find_recipe(path)] if path else []), *recipe.files)],
        "sources": inputs.question(model.name, model.tokenizer, data.path, data.data_files, model.revision),
        "output": str(training["output_dir"]),
        "marker": str(marker) if marker else None,
    }


@contextlib.contextmanager
def _marker(recipe: Recipe | None) -> Iterator[Path | None]:
    """A file where the run would write, for the other hosts to see; None where it cannot be written."""
    if recipe is None:
        yield None
        return
    place = inputs.nearest_existing(Path(str(recipe.training["output_dir"])))
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


def _try_ranks(diagnosis: Diagnosis, recipe: Recipe | None, hosts: Sequence[Host], with_ranks: bool) -> None:
    """Settle how the ranks would be started, and unless told otherwise start them."""
    found = diagnosis.findings
    if has_error(found, NEEDED_FOR_RANKS):
        if with_ranks:
            found.append(warning("ranks", "not started: the errors above come first", "correct them, and ask again"))
        return
    queues = bool(recipe) and recipe.launch.launcher == "slurm" and not hosts
    try:
        with tempfile.TemporaryDirectory() as directory:
            command = _command(recipe, diagnosis.reports, directory)
            if with_ranks and not queues:
                diagnosis.measured = links.measure(command)
                found += links.judge(diagnosis.measured)
    except UserError as problem:
        found.append(error("launcher", str(problem), "correct the recipe's launch section"))
    if with_ranks and queues:
        cure = "ask within a job: salloc --nodes=N ..., then sparse-zero doctor again; or --no-ranks"
        found.append(warning("ranks", "not started: this is no Slurm job", cure))


def _command(recipe: Recipe | None, reports: dict[str, Report], directory: str) -> Command:
    """Starts the probe as the run's ranks would be started; without a recipe on all devices, or on two ranks.

    Args: directory: for the launcher's files, which are this machine's own affair.
    """
    if recipe is not None:
        seconds = min(links.SECONDS, recipe.launch.rendezvous_seconds)
        launch = recipe.launch.model_copy(update={"rendezvous_seconds": seconds})
        training = {**recipe.training, "output_dir": directory}
        probed = recipe.model_copy(update={"training": training, "launch": launch})
        return launchers.ranks_command(probed, links.probe_words(bool(training.get("use_cpu")), seconds))
    accelerators = host_checks.accelerator_count(next(iter(reports.values())), Wanted())
    return links.command_here(accelerators or 2, use_cpu=not accelerators)
