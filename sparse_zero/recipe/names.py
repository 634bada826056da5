"""What names may be that become part of a command line, a batch script or another host's shell command.

Values are quoted there. A name cannot be: a quoted name is no name any more.
"""

import re

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_host(name: str) -> bool:
    """Whether this is the name or IPv4 address of a host. ssh would take `-F/file` for an option, and pdsh `exec:n1`
    for a way to run commands.
    """
    return _HOST.fullmatch(name) is not None


def is_address(name: str) -> bool:
    """Whether this is the name of a host, or its IPv4 or IPv6 address."""
    return _ADDRESS.fullmatch(name) is not None


def is_variable(name: str) -> bool:
    """Whether a shell can set an environment variable of this name."""
    return _VARIABLE.fullmatch(name) is not None


def is_option(name: str) -> bool:
    """Whether this is the long name of an option, without dashes in front."""
    return _OPTION.fullmatch(name) is not None


def has_control_character(text: str) -> bool:
    """Whether a text has a line break, a NUL, an escape or another control character."""
    return _CONTROL.search(text) is not None
