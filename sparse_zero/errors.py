"""The one exception that the command line turns into a single line and exit status 2."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Something the user gave cannot be used. The message says what, where, and what to do instead."""


def refuse_to_overwrite(out: Path) -> None:
    """Raises UserError: something is there, other than an empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; name a new directory")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names of `known` that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or nothing where no known name is near."""
    found = nearest(name, known, count=1)
    return f"; did you mean '{found[0]}'?" if found else ""
