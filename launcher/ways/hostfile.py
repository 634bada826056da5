"""Hostfiles: the hosts of a run and the number of ranks on each. DeepSpeed and Open MPI read the same format.

    # a comment
    n1 slots=8
    n2 slots=8

A file that is missing, empty or malformed is an error here. DeepSpeed's runner would start on this machine alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.names import is_host

_LINE = re.compile(r"(?P<name>[^\s=]+)\s+slots=(?P<slots>\d+)")


class Host(NamedTuple):
    """A host of a run."""

    name: str
    slots: int
    """The number of ranks on this host."""
    devices: tuple[int, ...] | None = None
    """The accelerators to use, if `include` or `exclude` names some; None: any."""


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts, in the file's order.

    Raises:
        UserError: the file cannot be read, a line is not `HOST slots=N`, a host is listed twice, or there is no host.
    """
    try:
        # Editors on Windows begin a file with a byte order mark
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"launch.hostfile: {path}: {reason}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or int(match["slots"]) < 1:
            raise UserError(f"{path}: line {number}: {line!r} is not of the form 'HOST slots=N', with N at least 1")
        if not is_host(match["name"]):
            raise UserError(
                f"{path}: line {number}: {match['name']!r} cannot be a host: use letters, digits, '.', '-' and '_', "
                "with a letter or digit in front"
            )
        if match["name"] in hosts:
            raise UserError(f"{path}: line {number}: host {match['name']} is listed twice")
        hosts[match["name"]] = Host(match["name"], int(match["slots"]))
    if not hosts:
        raise UserError(f"{path}: lists no host; write one line 'HOST slots=N' for each")
    return list(hosts.values())


def choose_hosts(hosts: Sequence[Host], include: str | None = None, exclude: str | None = None) -> list[Host]:
    """Filter hosts as DeepSpeed does: `n1@n2:0,2` names all devices of n1 and two devices of n2.

    Raises:
        UserError: a filter is malformed, names a host or a device that is not in the hostfile, or leaves no host.
    """
    chosen = {host.name: host for host in hosts}
    if include:
        named = _parse_filter("include", include, chosen)
        chosen = {
            name: Host(name, len(devices), devices) if devices else chosen[name] for name, devices in named.items()
        }
    if exclude:
        for name, devices in _parse_filter("exclude", exclude, chosen).items():
            left = tuple(number for number in range(chosen[name].slots) if devices and number not in devices)
            if left:
                chosen[name] = Host(name, len(left), left)
            else:
                del chosen[name]
    if not chosen:
        raise UserError(f"launch.exclude: '{exclude}' leaves no host of {', '.join(host.name for host in hosts)}")
    return [chosen[host.name] for host in hosts if host.name in chosen]


def _parse_filter(key: str, text: str, known: dict[str, Host]) -> dict[str, tuple[int, ...] | None]:
    named: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        name, colon, listed = part.strip().partition(":")
        if name not in known:
            raise UserError(f"launch.{key}: the hostfile has no host '{name}'{did_you_mean(name, known)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", listed):
            raise UserError(f"launch.{key}: '{part}' is not of the form HOST or HOST:0,2")
        numbers = tuple(sorted({int(number) for number in listed.split(",")})) if colon else None
        if numbers and numbers[-1] >= known[name].slots:
            raise UserError(f"launch.{key}: '{part}': {name} has {known[name].slots} slots, numbered from 0")
        named[name] = numbers
    return named
