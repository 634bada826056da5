"""What went wrong in a run of many ranks: one outcome out of what each of them says, or no longer says."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["failure", "refusal", "end", "death", "silence", "absence"]


@dataclass(frozen=True)
class Member:
    """A rank of a run, as it presents itself."""

    rank: int
    host: str
    pid: int
    log: str | None = None


@dataclass(frozen=True)
class Failure:
    """That a rank failed (an exception), refused (an error of the user's), ended by itself (`message` says why), died
    without a word, fell silent together with its host, or never came.
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
    """One line that names the rank and its host, and where its log is."""
    status: int
    """The exit status of all ranks."""
    ranks: tuple[int, ...]
    """Those that it began with."""
    traceback: str = ""
    is_error: bool = True
    """False where a rank was only told to stop."""


DIED = "died without a word: killed by somebody, or by the kernel for want of memory, or crashed"

_GONE: Sequence[Kind] = ("death", "silence", "absence")
"""The gravest first. A rank that is gone makes the others fail in their next collective: those are echoes, also where
they are heard of first."""


def find_cause(failures: Sequence[Failure], members: Mapping[int, Member], silence_seconds: float = 0) -> Outcome:
    """Of `troubles`, in the order of their arrival, the one that is the cause of the others.

    Args: members: every rank that ever came; silence_seconds: how long silent ranks have been waited for.
    """
    kinds = {failure.kind for failure in failures}
    kind = next((kind for kind in _GONE if kind in kinds), failures[0].kind)
    alike = [failure for failure in failures if failure.kind == kind]
    first = alike[0]
    if kind in _GONE:
        ranks = tuple(sorted({failure.rank for failure in alike}))
        say = {"death": _say_dead, "silence": _say_silent, "absence": _say_absent}[kind]
        return Outcome(say(ranks, members, silence_seconds), 1, ranks)
    if kind == "end":
        return Outcome(f"{_name(first.rank, members)} {first.message}", first.status, (first.rank,), is_error=False)
    said = tuple(failure.rank for failure in alike if failure.message == first.message)
    if kind == "refusal":
        # What all ranks meet is a matter of the recipe, what one meets a matter of its host.
        where = "" if 0 in said else f"{_name(first.rank, members)}: "
        return Outcome(f"{where}{first.message}", first.status, said)
    message = f"{_name(first.rank, members)} failed: {first.message}{_log(first.rank, members)}"
    return Outcome(message, first.status, (first.rank,), first.traceback)


def say_silent(seconds: float) -> str:
    return f"has not answered for {seconds:g} s: the host or its network is down"


def _say_dead(ranks: Sequence[int], members: Mapping[int, Member], seconds: float) -> str:
    return f"{_names(ranks, members)} {DIED}{_log(ranks[0], members)}"


def _say_silent(ranks: Sequence[int], members: Mapping[int, Member], seconds: float) -> str:
    hosts = ", ".join(dict.fromkeys(members[rank].host for rank in ranks))
    return f"{hosts} ({_numbers(ranks)}) {say_silent(seconds)}{_log(ranks[0], members)}"


def _say_absent(ranks: Sequence[int], members: Mapping[int, Member], seconds: float) -> str:
    there = "; there: " + ", ".join(_name(rank, members) for rank in sorted(members)[:8]) if members else ""
    return f"{_numbers(ranks)} did not come within {seconds:g} s (launch.rendezvous_seconds){there}"


def _names(ranks: Iterable[int], members: Mapping[int, Member]) -> str:
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(members[rank].host, []).append(rank)
    named = []
    for host, here in by_host.items():
        process = f" (process {members[here[0]].pid})" if len(here) == 1 else ""
        named.append(f"{_numbers(here)} on {host}{process}")
    return " and ".join(named)


def _name(rank: int, members: Mapping[int, Member]) -> str:
    return f"rank {rank} on {members[rank].host}" if rank in members else f"rank {rank}"


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _log(rank: int, members: Mapping[int, Member]) -> str:
    log = members[rank].log if rank in members else None
    return f"; its log is {log}" if log else ""
