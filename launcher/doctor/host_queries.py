"""How `sparse-zero doctor` gets every host's report: from this machine, by ssh, or by srun within a Slurm job."""

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
from launcher.ways.command import rank_environment
from sparse_zero.recipe.launch import LaunchSection

ANSWER_SECONDS = 120
"""A first import of torch from a shared disk takes a minute."""
_NO_DIRECTORY, _PROLOGUE_FAILED = 71, 72


@dataclass(frozen=True)
class Answer:
    """What came of asking one host: a report, or the reason why there is none."""

    report: Report | None
    problem: Finding | None = None
    clock_offset: float = 0.0
    """Seconds by which the host's clock is certainly ahead of this one's; negative: behind."""


def ask_here(question: Mapping[str, Any], launch: LaunchSection) -> Answer:
    """This machine's own report."""
    return _ask(socket.gethostname(), ["bash", "-c", _script(question, launch)])


def ask_by_ssh(hosts: Sequence[str], questions: Sequence[Mapping[str, Any]], launch: LaunchSection) -> list[Answer]:
    """The reports of `hosts`, asked at the same time."""
    commands = [
        ["bash", "-c", _script(question, launch)]
        if launchers.starts_here(launch, host)
        else [*reachability.SSH, host, host_command(question, launch)]
        for host, question in zip(hosts, questions, strict=True)
    ]
    return reachability.ask_all(_ask, hosts, commands)


def ask_by_srun(nodes: Sequence[str], question: Mapping[str, Any], launch: LaunchSection) -> list[Answer]:
    """The reports of a Slurm job's nodes, asked at the same time, by a step on each: of a step on all of them srun may
    print one task's line within another's.

    Raises UserError: `launch.environment` asks to pass on a variable that is not set; so do the other two.
    """
    script = ["bash", "-c", _script(question, launch)]
    return reachability.ask_all(_ask, nodes, [[*reachability.SRUN, f"--nodelist={node}", *script] for node in nodes])


def host_command(question: Mapping[str, Any], launch: LaunchSection) -> str:
    """What to give to ssh: the report's command in this working directory, as the ranks would be started."""
    return f"bash -c {shlex.quote(_script(question, launch))}"


def _script(question: Mapping[str, Any], launch: LaunchSection) -> str:
    """Lines for bash, which do what launcher.ways.command.wrapped does, and tell by their status what has failed."""
    inherited = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    variables = {**inherited, **rank_environment(launch)}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    python = [*launch.container, sys.executable, "-m", "launcher.doctor.host_report", json.dumps(question)]
    lines = [f"cd {shlex.quote(str(Path.cwd()))} || exit {_NO_DIRECTORY}", *exports]
    if launch.prologue:
        lines += ["set -e", f"trap 'exit {_PROLOGUE_FAILED}' ERR", *launch.prologue, "trap - ERR"]
    return "\n".join([*lines, f"exec {shlex.join(python)}"])


def _ask(host: str, command: Sequence[str]) -> Answer:
    before = time.time()
    done = reachability.run(command, ANSWER_SECONDS)
    after = time.time()
    for report in _reports(done.stdout):
        return Answer(report, clock_offset=clock_offset(before, *report["clock"], after))
    return Answer(None, explain(host, done.returncode, done.stderr))


def _reports(output: str) -> list[Report]:
    """Those in what hosts have printed; login scripts and prologues may print around them."""
    return [json.loads(line.partition(MARK)[2]) for line in output.splitlines() if MARK in line]


def clock_offset(before: float, started: float, ended: float, after: float) -> float:
    """How far, at least, a host's clock is from ours.

    Args: before, after: when we asked and had the answer, by our clock; started, ended: when the host began and
        finished answering, by its own. Its offset is between ended - after and started - before.
    """
    lowest, highest = ended - after, started - before
    return 0.0 if lowest <= 0 <= highest else min(lowest, highest, key=abs)


def explain(host: str, status: int, stderr: str) -> Finding:
    """Why a host gave no report: the exit status and the last words of ssh, the shell or Python."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = said[-1] if said else f"status {status}"
    if status == 255:
        return _explain_ssh(host, stderr.lower(), last)
    if status == _NO_DIRECTORY:
        remedy = "start from a directory that all hosts share, or copy it to each at the same path"
        return error("reach", f"has no directory {Path.cwd()}", remedy, host)
    if status == _PROLOGUE_FAILED:
        return error("reach", f"a line of launch.prologue fails: {last}", "correct it, or the host", host)
    if status in (126, 127):
        python = f"{sys.executable} cannot be run: {last}"
        return error("reach", python, "install the same environment there, or share its directory", host)
    if "No module named" in stderr:
        remedy = "install sparse-zero into that Python, at the same version"
        return error("reach", f"{sys.executable}: {last}", remedy, host)
    return error("reach", f"gave no report: {last}", "run there: python -m launcher.doctor.host_report '{}'", host)


def _explain_ssh(host: str, said: str, last: str) -> Finding:
    causes = {
        "permission denied": f"let this user in without a password: ssh-copy-id {host}",
        "host key verification": f"make its key known: ssh-keyscan {host} >> ~/.ssh/known_hosts",
        "could not resolve": "correct the name in the hostfile, or add it to /etc/hosts or the DNS",
    }
    remedy = next((cure for words, cure in causes.items() if words in said), None)
    remedy = remedy or f"see whether it is up and runs sshd: ssh {host} true"
    return error("reach", f"ssh cannot get in: {last}", remedy, host)
