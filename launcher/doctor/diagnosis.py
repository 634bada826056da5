"""Checks everything that a run needs before it waits for hours in a queue: all hosts, their network, Slurm, the ranks.

    diagnosis = diagnose(load_recipe("demo.yaml"), "demo.yaml")

The report of each host, including this one, is made in a separate process, so that a broken torch can be reported.
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

from launcher.doctor import (
    host_checks,
    host_comparison,
    input_sources,
    links,
    local_checks,
    report_collection,
    slurm_checks,
)
from launcher.doctor.findings import Finding, error, has_error, ok, warning
from launcher.doctor.host_checks import HostRequirements
from launcher.doctor.host_report import Report
from launcher.doctor.report_collection import HostResponse
from launcher.jobs import submit
from launcher.ways import launchers, preflight
from launcher.ways.command import Command, private_variables
from launcher.ways.hostfile import Host
from launcher.ways.remote import hosts_of
from launcher.ways.slurm import ranks_per_node
from sparse_zero.errors import UserError
from sparse_zero.ranks.placement import node_address
from sparse_zero.recipe import secrets
from sparse_zero.recipe.launch import LaunchSection
from sparse_zero.recipe.lookup import find_recipe
from sparse_zero.recipe.recipe import Recipe

REQUIRED_FOR_RANKS = ("accelerator", "backend", "hostfile", "launcher", "network", "port", "reachability", "versions")
"""Checks whose errors already explain why the ranks cannot connect. Starting the ranks would take minutes to find the
same."""


@dataclass
class Diagnosis:
    """The results of all checks."""

    findings: list[Finding] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    """The hosts' reports, by host name."""
    measured: links.LinkMeasurements | None = None
    """None: no ranks were started."""

    @property
    def status(self) -> int:
        """The exit status: 1 if there is an error."""
        return 1 if has_error(self.findings) else 0

    def to_json(self) -> dict[str, Any]:
        """The value that --json prints: `errors` and `warnings` are counts; `ranks` is null if none were started."""
        counts = {f"{name}s": sum(f.severity == name for f in self.findings) for name in ("error", "warning")}
        findings = [asdict(finding) for finding in self.findings]
        ranks = asdict(self.measured) if self.measured else None
        return {**counts, "findings": findings, "hosts": self.reports, "ranks": ranks}


def diagnose(
    recipe: Recipe | None = None, path: str | None = None, overrides: Sequence[str] = (), with_ranks: bool = True
) -> Diagnosis:
    """Check all hosts of a recipe's run, or this machine if there is no recipe.

    Args:
        recipe: None: check only what any run needs.
        path: the file from which the recipe was read.
        overrides: the key=value words with which it was read.
        with_ranks: also start the ranks, to measure their links.
    """
    launch = recipe.launch if recipe else LaunchSection()
    diagnosis = Diagnosis()
    found = diagnosis.findings
    found += local_checks.launcher_programs(launch)
    found += local_checks.hidden_settings(os.environ, Path.home())
    for each in secrets.warnings(recipe) if recipe else []:
        found.append(warning("environment", *each.split(": ", 1)))
    hosts: list[Host] = []
    try:
        hosts = hosts_to_check(recipe)
    except UserError as problem:
        found.append(error("hostfile", str(problem), "correct launch.hostfile, include, exclude or nodes"))
    try:
        private_variables(launch)
    except UserError as problem:
        found.append(error("launcher", str(problem), "correct launch.environment"))
    else:
        _check_hosts(diagnosis, recipe, path, hosts)
    found += _deepspeed_file(recipe)
    if recipe is None and slurm_checks.is_installed():
        found += slurm_checks.check(None)
    elif recipe and launch.launcher == "slurm" and not hosts:
        found += _job(recipe, path, overrides)
    _check_ranks(diagnosis, recipe, hosts, with_ranks)
    return diagnosis


def hosts_to_check(recipe: Recipe | None) -> list[Host]:
    """The hosts of a run in the order of its ranks, with the number of ranks of each. Empty: only this machine.

    Raises UserError: the hostfile or a filter is not valid, or there are fewer hosts or slots than the recipe needs.
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
            yield error("files", str(problem), "correct the file")


def _job(recipe: Recipe, path: str | None, overrides: Sequence[str]) -> list[Finding]:
    """Checks that Slurm accepts the job that `sparse-zero submit` makes from the recipe."""
    found = slurm_checks.check(recipe.launch)
    if path is None or any(finding.severity != "ok" for finding in found):
        return found
    try:
        job = submit.plan(recipe, path, overrides)
    except UserError as problem:
        return [*found, error("slurm", str(problem), "correct launch.slurm")]
    return [*found, *slurm_checks.check_submission(job.text, job.command.environ())]


def _check_hosts(diagnosis: Diagnosis, recipe: Recipe | None, path: str | None, hosts: Sequence[Host]) -> None:
    launch = recipe.launch if recipe else LaunchSection()
    several = len(hosts) > 1
    # As in launcher.ways.remote and slurm: Slurm may know a node only by its address.
    master = None
    if several:
        master = launch.master_addr or (node_address(hosts[0].name) if launch.launcher == "slurm" else hosts[0].name)
    with _marker(recipe if several else None) as marker:
        # On the host of rank 0 the route to rank 0 is the loopback interface, but the route to the last host is not.
        request = report_request(recipe, path, marker, [master, hosts[-1].name] if several else [])
        responses = _collect_reports(request, launch, hosts)
    found, offsets = diagnosis.findings, {}
    for index, (name, response) in enumerate(responses.items()):
        if response.report is None:
            found += [response.problem] if response.problem else []
            continue
        if hosts:
            found.append(ok("reachability", "responds", name))
        diagnosis.reports[name], offsets[name] = response.report, response.clock_offset
        per_node = None if launch.processes_per_node == "auto" else int(launch.processes_per_node)
        ranks = hosts[index].slots if hosts else per_node
        has_ranks = bool(hosts) or launch.launcher != "slurm"
        required = HostRequirements(recipe, ranks, has_ranks, several, master)
        found += host_checks.check_host(response.report, required, name)
    use_cpu = bool(recipe and recipe.training.get("use_cpu"))
    found += host_comparison.compare_hosts(diagnosis.reports, offsets, use_cpu)


def _collect_reports(request: dict[str, Any], launch: LaunchSection, hosts: Sequence[Host]) -> dict[str, HostResponse]:
    """The response of each host, by name, in the order of the ranks."""
    names = [host.name for host in hosts]
    if not hosts:
        return {socket.gethostname(): report_collection.collect_here(request, launch)}
    # Only the host of rank 0 needs the port, and all Slurm tasks get the same request.
    without_port = {**request, "port": None}
    if launch.launcher == "slurm":
        return dict(zip(names, report_collection.collect_with_srun(names, without_port, launch), strict=True))
    requests = [request, *[without_port] * (len(hosts) - 1)]
    return dict(zip(names, report_collection.collect_over_ssh(names, requests, launch), strict=True))


def report_request(
    recipe: Recipe | None, path: str | None, marker: Path | None, peers: Sequence[str]
) -> dict[str, Any]:
    """The request to each host; see launcher.doctor.host_report."""
    request: dict[str, Any] = {"torch": True, "port": None, "peers": list(peers)}
    if recipe is None:
        return request
    model, data, training = recipe.model, recipe.data, recipe.training
    return {
        **request,
        "port": None if recipe.launch.master_port == "auto" else recipe.launch.master_port,
        "files": [*([str(find_recipe(path))] if path else []), *recipe.files.values()],
        "sources": input_sources.sources_request(
            model.source, model.tokenizer, data.path, data.data_files, model.revision
        ),
        "output": str(training["output_dir"]),
        "marker": str(marker) if marker else None,
    }


@contextlib.contextmanager
def _marker(recipe: Recipe | None) -> Iterator[Path | None]:
    """A temporary file at training.output_dir, for which the other hosts look. None if it cannot be written."""
    if recipe is None:
        yield None
        return
    place = input_sources.nearest_existing(Path(str(recipe.training["output_dir"])))
    marker = place / f".sparse-zero-doctor-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError:
        # This host's own report says that it cannot write to the directory.
        yield None
        return
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _check_ranks(diagnosis: Diagnosis, recipe: Recipe | None, hosts: Sequence[Host], with_ranks: bool) -> None:
    """Check the command that would start the ranks. With `with_ranks`, also start them and measure their links."""
    found = diagnosis.findings
    if has_error(found, REQUIRED_FOR_RANKS):
        if with_ranks:
            message, remedy = "not started because of the errors above", "correct them, and run doctor again"
            found.append(warning("ranks", message, remedy))
        return
    is_outside_job = bool(recipe) and recipe.launch.launcher == "slurm" and not hosts
    try:
        with tempfile.TemporaryDirectory() as directory:
            command = _probe_command(recipe, diagnosis.reports, directory)
            if with_ranks and not is_outside_job:
                diagnosis.measured = links.measure(command)
                found += links.check_links(diagnosis.measured)
    except UserError as problem:
        found.append(error("launcher", str(problem), "correct the recipe's launch section"))
    if with_ranks and is_outside_job:
        remedy = "run doctor within a job (salloc --nodes=N ..., then sparse-zero doctor), or add --no-ranks"
        found.append(warning("ranks", "not started: this is not a Slurm job", remedy))


def _probe_command(recipe: Recipe | None, reports: dict[str, Report], directory: str) -> Command:
    """The command that starts the link probe like the run's ranks; without a recipe, on all accelerators of this
    machine, or on two ranks if there is none.

    Args: directory: for the launcher's files, on this machine only.
    """
    if recipe is not None:
        seconds = min(links.PROBE_SECONDS, recipe.launch.rendezvous_seconds)
        launch = recipe.launch.model_copy(update={"rendezvous_seconds": seconds})
        training = {**recipe.training, "output_dir": directory}
        probed = recipe.model_copy(update={"training": training, "launch": launch})
        return launchers.ranks_command(probed, links.probe_arguments(bool(training.get("use_cpu")), seconds))
    accelerators = host_checks.accelerator_count(next(iter(reports.values())), HostRequirements())
    return links.local_probe_command(accelerators or 2, use_cpu=not accelerators)
