"""Finds out which hosts of a run answer, with time limits."""

import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sparse_zero.errors import printable_line

CONNECT_SECONDS = 10
SSH = (
    *("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "LogLevel=ERROR"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
SRUN = ("srun", "--overlap", "--nodes=1", "--ntasks=1")
"""A step on one node of this job, which may share the node's cores with other steps."""
_SECONDS = 15.0

Answer = TypeVar("Answer")


def unreachable_hosts(names: Sequence[str]) -> dict[str, str]:
    """Try all hosts by ssh at the same time. Returns the reason for each that fails."""
    return _unreachable(names, lambda name: [*SSH, name, "true"])


def unreachable_nodes(names: Sequence[str]) -> dict[str, str]:
    """Start a step on each of these nodes of this Slurm job. Returns the reason for each that fails."""
    return _unreachable(names, lambda name: [*SRUN, "--immediate=5", "--quiet", f"--nodelist={name}", "true"])


def _unreachable(names: Sequence[str], command: Callable[[str], list[str]]) -> dict[str, str]:
    answers = ask_all(lambda name: _problem(run(command(name), _SECONDS)), names)
    return {name: problem for name, problem in zip(names, answers, strict=True) if problem is not None}


def _problem(done: subprocess.CompletedProcess) -> str | None:
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or [f"{done.args[0]} exited with status {done.returncode}"])[-1]
    return printable_line(last)


def ask_all(ask: Callable[..., Answer], *questions: Sequence) -> list[Answer]:
    """`map` with threads: the results in the order of the questions."""
    with ThreadPoolExecutor(max_workers=64) as pool:
        return list(pool.map(ask, *questions))


def run(
    command: Sequence[str], seconds: float, stdin: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a command. The status is 124 after a timeout and 255 if the program cannot be started, with the reason in
    stderr.
    """
    options = {"input": stdin, "env": environment, "capture_output": True, "text": True, "errors": "replace"}
    try:
        return subprocess.run(command, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {seconds:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 255, "", f"{command[0]}: {error.strerror}")


def is_here(name: str) -> bool:
    """Whether this is the host of that name."""
    return name in ("localhost", socket.gethostname())
