"""The results of `sparse-zero doctor`: findings with a severity, and a remedy unless all is well."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    severity: Severity
    check: str
    """The check's name, in a word or two: versions, network, disk, ..."""
    message: str
    remedy: str | None = None
    host: str | None = None
    """None: the finding concerns the whole run."""


def ok(check: str, message: str, host: str | None = None) -> Finding:
    """A finding that needs no action."""
    return Finding("ok", check, message, None, host)


def warning(check: str, message: str, remedy: str, host: str | None = None) -> Finding:
    """A finding that may make the run fail, or make it slow."""
    return Finding("warning", check, message, remedy, host)


def error(check: str, message: str, remedy: str, host: str | None = None) -> Finding:
    """A finding that makes the run fail, hang or give wrong results."""
    return Finding("error", check, message, remedy, host)


def has_error(findings: Iterable[Finding], checks: Iterable[str] | None = None) -> bool:
    """Whether there is an error. Args: checks: consider only the findings of these checks; None: all."""
    wanted = None if checks is None else set(checks)
    return any(f.severity == "error" and (wanted is None or f.check in wanted) for f in findings)
