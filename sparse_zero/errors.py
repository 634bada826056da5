"""The exception that the command line prints as a single line, with exit status 2."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

MAX_MESSAGE = 2000
"""Characters of a message. A name from a file may have millions."""


class UserError(ValueError):
    """An error in the user's input. The message says what is wrong, where, and what to do. It may quote a file or a
    host that nobody trusts, and is made `printable`."""

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} [...] {message[-MAX_MESSAGE // 4 :]}"
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""The text as a terminal may show it: control characters as escapes (`\x1b`). Line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def disk_problem(error: BaseException) -> str | None:
    """What the operating system says of a file that could not be written; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers, which are written in Rust, have errors of their own
    found = re.search(r"([A-Z][\w ]*) \(os error \d+\)", str(error))
    return found[1] if found else None


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


def printable_line(text: str) -> str:
    """`text` as one line: as `printable`, and tabs and line breaks are escaped too."""
    return re.sub(r"[\t\n]", _escape, printable(text))


def _escape(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()
