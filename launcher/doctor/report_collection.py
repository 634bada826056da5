"""Collects every host's report: from this machine, over ssh, or with srun in a Slurm job."""

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.doctor.findings import Finding, error
from launcher.doctor.host_report import MARK, Report
from launcher.ways import launchers, reachability
from launcher.ways.command import SAFE_PATH, private_variables
from sparse_zero.recipe.launch import LaunchSection

TIMEOUT_SECONDS = 120
"""The first import of torch from a shared disk takes a minute."""
BASH = ("bash", "-c", 'eval "$(cat)"')
"""Runs the script on its standard input, whose variables a command line would show to every user of the host."""
_NO_DIRECTORY, _PROLOGUE_FAILED = 71, 72
"""Exit statuses of `_script`."""


@dataclass(frozen=True)
class HostResponse:
    """The response of one host: its report, or the reason why there is none."""

    report: Report | None
    problem: Finding | None = None
    clock_offset: float = 0.0
    """Seconds by which the host's clock is at least ahead of this machine's; negative: behind."""


def collect_here(request: Mapping[str, Any], launch: LaunchSection) -> HostResponse:
    """Collect this machine's own report. Args: request: see `launcher.doctor.host_report`."""
    return _collect(socket.gethostname(), BASH, _script(request, launch))


def collect_over_ssh(
    hosts: Sequence[str], requests: Sequence[Mapping[str, Any]], launch: LaunchSection
) -> list[HostResponse]:
    """Collect the reports of `hosts` at the same time. Args: requests: one for each host."""
    commands = [
        BASH if launchers.starts_here(launch, host) else [*reachability.SSH, host, shlex.join(BASH)] for host in hosts
    ]
    return reachability.ask_all(_collect, hosts, commands, [_script(request, launch) for request in requests])


def collect_with_srun(nodes: Sequence[str], request: Mapping[str, Any], launch: LaunchSection) -> list[HostResponse]:
    """Collect the reports of a Slurm job's nodes at the same time, with one step for each node: with one step for all
    nodes, srun may print one task's line within another's.

    Raises UserError, as the other two functions do: `launch.environment` passes on a variable that is not set.
    """
    commands = [[*reachability.SRUN, f"--nodelist={node}", *BASH] for node in nodes]
    return reachability.ask_all(_collect, nodes, commands, [_script(request, launch)] * len(nodes))


def _script(request: Mapping[str, Any], launch: LaunchSection) -> str:
    """A script for BASH that makes the report in this working directory, in the environment of the ranks. It does the
    same as launcher.ways.command.wrapped, and its exit status says what failed.
    """
    inherited = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    variables = {**inherited, **SAFE_PATH, **private_variables(launch)}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    python = [*launch.container, sys.executable, "-m", "launcher.doctor.host_report", json.dumps(request)]
    lines = [f"cd {shlex.quote(str(Path.cwd()))} || exit {_NO_DIRECTORY}", *exports]
    if launch.prologue:
        lines += ["set -e", f"trap 'exit {_PROLOGUE_FAILED}' ERR", *launch.prologue, "trap - ERR"]
    return "\n".join([*lines, f"exec {shlex.join(python)}"])


def _collect(host: str, command: Sequence[str], script: str) -> HostResponse:
    before = time.time()
    done = reachability.run(command, TIMEOUT_SECONDS, stdin=script)
    after = time.time()
    for report in _reports(done.stdout):
        return HostResponse(report, clock_offset=clock_offset(before, *report["clock"], after))
    return HostResponse(None, explain_failure(host, done.returncode, done.stderr))


def _reports(output: str) -> list[Report]:
    """The reports in a host's output. Login scripts and prologues may print other lines."""
    return [json.loads(line.partition(MARK)[2]) for line in output.splitlines() if MARK in line]


def clock_offset(before: float, started: float, ended: float, after: float) -> float:
    """The least amount by which a host's clock differs from this machine's.

    Args:
        before, after: when this machine sent the request and received the response, by its own clock, in seconds.
        started, ended: when the host began and finished its report, by the host's clock, in seconds.

    Returns: seconds, positive if the host's clock is ahead. The true offset is between ended - after and
        started - before; 0 if that range contains 0.
    """
    lowest, highest = ended - after, started - before
    return 0.0 if lowest <= 0 <= highest else min(lowest, highest, key=abs)


def explain_failure(host: str, status: int, stderr: str) -> Finding:
    """Why a host gave no report. Args: status, stderr: of ssh, srun or bash."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"status {status}"
    if status == 255:
        return _explain_ssh(host, stderr.lower(), last)
    if status == _NO_DIRECTORY:
        remedy = "start the run from a directory that all hosts share, or copy it to the same path on each host"
        return error("reachability", f"has no directory {Path.cwd()}", remedy, host)
    if status == _PROLOGUE_FAILED:
        message = f"a line of launch.prologue fails: {last}"
        return error("reachability", message, "correct launch.prologue, or install what it needs on that host", host)
    if status in (126, 127):
        python = f"{sys.executable} cannot be run: {last}"
        return error("reachability", python, "install the same environment on that host, or share its directory", host)
    if "No module named" in stderr:
        remedy = "install the same version of sparse-zero for this Python"
        return error("reachability", f"{sys.executable}: {last}", remedy, host)
    remedy = "run on that host: python -m launcher.doctor.host_report '{}'"
    return error("reachability", f"gave no report: {last}", remedy, host)


def _explain_ssh(host: str, stderr: str, last: str) -> Finding:
    causes = {
        "permission denied": f"allow login without a password: ssh-copy-id {host}",
        "host key verification": f"add its key: ssh-keyscan {host} >> ~/.ssh/known_hosts",
        "could not resolve": "correct the name in the hostfile, or add it to /etc/hosts or the DNS",
    }
    remedy = next((cure for words, cure in causes.items() if words in stderr), None)
    remedy = remedy or f"check that it is up and runs sshd: ssh {host} true"
    return error("reachability", f"ssh cannot log in: {last}", remedy, host)
