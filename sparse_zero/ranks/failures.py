"""The failures of ranks, and which of them is the root cause that ends the run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["exception", "user_error", "stopped", "died", "unreachable", "missing"]


@dataclass(frozen=True)
class RankInfo:
    """A rank as it introduces itself to the watchdog."""

    rank: int
    host: str
    pid: int
    log: str | None = None
    """Path of the rank's log file."""


@dataclass(frozen=True)
class Failure:
    """The failure of one rank. There are six kinds:

    exception: the rank raised an exception (`message`, `traceback`)
    user_error: the rank found an error that the user can correct (`message`)
    stopped: the rank exited on request (`message` says why)
    died: the rank's process exited without a message
    unreachable: the rank's host does not answer
    missing: the rank did not join in time
    """

    rank: int
    kind: Kind
    message: str = ""
    traceback: str = ""
    status: int = 1


@dataclass(frozen=True)
class Outcome:
    """Why a run ends."""

    message: str
    """One line for the user. It names the rank, its host and its log where they matter."""
    status: int
    """The exit status of all ranks."""
    ranks: tuple[int, ...]
    """The ranks that caused it."""
    traceback: str = ""
    is_error: bool = True
    """False if a rank exited on request."""


KILLED = "was killed (possibly out of memory) or crashed"
DIED = "exited unexpectedly: killed (possibly out of memory) or crashed"

_GONE: Sequence[Kind] = ("died", "unreachable", "missing")
"""The most severe kind first. If a rank is gone, the next collective fails on all others. Their failures are
consequences, even if they arrive first."""


def find_root_cause(failures: Sequence[Failure], ranks: Mapping[int, RankInfo], waited_seconds: float = 0) -> Outcome:
    """Find the failure that caused the others.

    Args:
        failures: all failures, in order of arrival.
        ranks: all ranks that have joined.
        waited_seconds: how long the watchdog waited for unreachable or missing ranks.
    """
    kinds = {failure.kind for failure in failures}
    kind = next((kind for kind in _GONE if kind in kinds), failures[0].kind)
    same_kind = [failure for failure in failures if failure.kind == kind]
    first = same_kind[0]
    if kind in _GONE:
        gone = tuple(sorted({failure.rank for failure in same_kind}))
        describe = {"died": _describe_died, "unreachable": _describe_unreachable, "missing": _describe_missing}[kind]
        return Outcome(describe(gone, ranks, waited_seconds), 1, gone)
    if kind == "stopped":
        return Outcome(f"{_name(first.rank, ranks)} {first.message}", first.status, (first.rank,), is_error=False)
    reporters = tuple(failure.rank for failure in same_kind if failure.message == first.message)
    if kind == "user_error":
        # An error of all ranks concerns the recipe. An error of one rank concerns its host, which is then named.
        where = "" if 0 in reporters else f"{_name(first.rank, ranks)}: "
        return Outcome(f"{where}{first.message}", first.status, reporters)
    message = f"{_name(first.rank, ranks)} failed: {first.message}{_log(first.rank, ranks)}"
    return Outcome(message, first.status, (first.rank,), first.traceback)


def describe_lost_launcher(rank: RankInfo, process: int) -> str:
    """What to say of a launcher that has ended before its rank. Args: process: the launcher's process id."""
    return f"the launcher of rank {rank.rank} on {rank.host} (process {process}) {KILLED}"


def describe_stuck(stuck: Sequence[int], silent: Sequence[int], ranks: Mapping[int, RankInfo], seconds: float) -> str:
    """What to say of ranks that are killed because they have not stopped in time.

    Args:
        stuck: these ranks; at least one.
        silent: those of them that have not answered the request to stop. The others may only be waiting for them.
        seconds: how long they had.
    """
    named = silent or stuck
    did = "did not answer the request to stop" if silent else "did not stop"
    log = _log(named[0], ranks)
    if not silent and log:
        log = f"; the log of each rank has its Python stacks, as {ranks[named[0]].log}"
    return f"{_names(named, ranks)} {did} within {seconds:g} s (launch.grace_seconds): all ranks are killed{log}"


def unreachable_message(seconds: float) -> str:
    """What to say of a host that has not answered for some seconds."""
    return f"has not answered for {seconds:g} s: the host or its network is down"


def _describe_died(gone: Sequence[int], ranks: Mapping[int, RankInfo], seconds: float) -> str:
    return f"{_names(gone, ranks)} {DIED}{_log(gone[0], ranks)}"


def _describe_unreachable(gone: Sequence[int], ranks: Mapping[int, RankInfo], seconds: float) -> str:
    hosts = ", ".join(dict.fromkeys(ranks[rank].host for rank in gone))
    return f"{hosts} ({_numbers(gone)}) {unreachable_message(seconds)}{_log(gone[0], ranks)}"


def _describe_missing(gone: Sequence[int], ranks: Mapping[int, RankInfo], seconds: float) -> str:
    joined = "; joined: " + ", ".join(_name(rank, ranks) for rank in sorted(ranks)[:8]) if ranks else ""
    return f"{_numbers(gone)} did not join within {seconds:g} s (launch.rendezvous_seconds){joined}"


def _names(numbers: Iterable[int], ranks: Mapping[int, RankInfo]) -> str:
    by_host: dict[str, list[int]] = {}
    for rank in numbers:
        by_host.setdefault(ranks[rank].host, []).append(rank)
    named = []
    for host, here in by_host.items():
        process = f" (process {ranks[here[0]].pid})" if len(here) == 1 else ""
        named.append(f"{_numbers(here)} on {host}{process}")
    return " and ".join(named)


def _name(rank: int, ranks: Mapping[int, RankInfo]) -> str:
    return f"rank {rank} on {ranks[rank].host}" if rank in ranks else f"rank {rank}"


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _log(rank: int, ranks: Mapping[int, RankInfo]) -> str:
    log = ranks[rank].log if rank in ranks else None
    return f"; its log is {log}" if log else ""
