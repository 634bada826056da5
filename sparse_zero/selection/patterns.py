"""Patterns of names: `targets`, `exclude_modules` and `modules_to_save` of a SparseConfig."""

import fnmatch
from collections.abc import Iterable

from sparse_zero.errors import nearest


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a shell pattern matches the whole name, or an ending of the name after a dot."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase("." + name, "*." + p) for p in patterns)


def within(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter or a module that contains it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:k]), [pattern]) for k in range(1, len(parts) + 1))


def similar(pattern: str, names: Iterable[str]) -> str:
    """The end of an error message: the endings of names that are most like the pattern."""
    endings = dict.fromkeys(".".join(name.split(".")[-k:]) for k in (pattern.count(".") + 1, 1, 2) for name in names)
    found = nearest(pattern, endings) or [e for e in endings if "." not in e and not e.isdigit()][:6]
    return f"; similar names: {', '.join(found)}" if found else ""
