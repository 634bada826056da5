"""Which hosts of a run answer, and by which address they reach this one."""

import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
_SECONDS = 15.0


def unreachable_hosts(names: Sequence[str]) -> dict[str, str]:
    """Ask all by ssh at once. Returns: why, for each that cannot be used."""
    return _ask_all(names, lambda name: [*SSH, name, "true"])


def unreachable_nodes(names: Sequence[str]) -> dict[str, str]:
    """The same of the nodes of this Slurm job, by a step on each."""
    options = ["--overlap", "--nodes=1", "--ntasks=1", "--immediate=5", "--quiet"]
    return _ask_all(names, lambda name: ["srun", *options, f"--nodelist={name}", "true"])


def _ask_all(names: Sequence[str], command) -> dict[str, str]:
    with ThreadPoolExecutor(max(1, min(64, len(names)))) as pool:
        answers = pool.map(lambda name: _ask(command(name)), names)
        return {name: problem for name, problem in zip(names, answers, strict=True) if problem is not None}


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS:g} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"{command[0]} ended with status {done.returncode}"])[-1]


def own_address(towards: str) -> str:
    """The address by which the host `towards` reaches this one; this host's name where there is no telling."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing, but finds the route
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]
