"""What `sparse-zero doctor` has to say: findings, each with its severity, and with a remedy where one is needed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    severity: Severity
    check: str
    """What was looked at, in a word: versions, network, disk, ..."""
    message: str
    remedy: str | None = None
    host: str | None = None
    """None: the run as a whole."""


def ok(check: str, message: str, host: str | None = None) -> Finding:
    return Finding("ok", check, message, None, host)


def warning(check: str, message: str, remedy: str, host: str | None = None) -> Finding:
    """The run may go wrong, or slowly."""
    return Finding("warning", check, message, remedy, host)


def error(check: str, message: str, remedy: str, host: str | None = None) -> Finding:
    """The run would fail, hang or give wrong results."""
    return Finding("error", check, message, remedy, host)


def has_error(findings: Iterable[Finding], checks: Iterable[str] | None = None) -> bool:
    """Whether there is an error, among these `checks` only where they are given."""
    wanted = None if checks is None else set(checks)
    return any(f.severity == "error" and (wanted is None or f.check in wanted) for f in findings)
