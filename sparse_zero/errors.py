"""The exception that the command line prints as a single line, with exit status 2."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """An error in the user's input. The message says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_to_overwrite(out: Path) -> None:
    """Raises UserError: `out` exists and is not an empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not an empty directory; give another directory")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` that are most similar to `name`, most similar first. Args: count: the maximum number."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: `"; did you mean 'x'?"`, or nothing if no name in `known` is similar."""
    found = nearest(name, known, count=1)
    return f"; did you mean '{found[0]}'?" if found else ""


def printable(text: str) -> str:
    """`text` with its control characters written as escapes, but for tabs and line breaks: for text that came over the
    network, which must not control a terminal or forge a line of a log.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", _escape, text)


def printable_line(text: str) -> str:
    """`text` as one line: as `printable`, and tabs and line breaks are escaped too."""
    return re.sub(r"[\t\n]", _escape, printable(text))


def _escape(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()
