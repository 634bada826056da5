"""Output of the subcommands: tables for people, one JSON value for programs, one line for an error."""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparse_zero.errors import printable, printable_line
from sparse_zero.json_text import json_text

PROGRAM = "sparse-zero"


def say_error(message: str) -> None:
    """Print `message` on stderr as a single line."""
    print(f"{PROGRAM}: error: {printable_line(' '.join(message.split()))}", file=sys.stderr)


def say_warning(message: str) -> None:
    """Print `message` on stderr as a single line."""
    print(f"{PROGRAM}: warning: {printable_line(' '.join(message.split()))}", file=sys.stderr)


@contextlib.contextmanager
def only_json_on_stdout(wanted: bool) -> Iterator[None]:
    """If `wanted`, redirect what libraries print within this block to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Print `value` on stdout. Types that JSON does not have become strings; NaN and infinite numbers, null."""
    print(json_text(value, default=str))


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print a title, then a line for each fact."""
    from rich.table import Table

    print(printable(title))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name.replace("_", " "), readable(name, fact))
    _print(table)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a column for each key of the first row."""
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(readable(name, value) for name, value in row.items()))
    _print(table)


def print_beside(columns: Mapping[str, str]) -> None:
    """Print texts beside each other, each under its title."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", expand=True)
    for title in columns:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(Text(printable(text.strip()) or "(nothing)") for text in columns.values()))
    Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def hide_progress() -> None:
    """No bars of libraries while a model is loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()


MAX_ROWS = 30
"""Longer tables are cut here; --json prints all rows."""


def print_description(title: str, facts: Mapping[str, Any]) -> None:
    """Print the facts that `sparse_zero.adapters.inspection.describe` returns."""
    tables = ("kinds", "layers", "tensors", "histogram", "largest", "notes")
    print_facts(
        title, {name: fact for name, fact in facts.items() if name not in tables and fact not in (None, {}, [])}
    )
    few = len(facts["tensors"]) <= MAX_ROWS
    for name, heading in (("kinds", "weights of each kind"), ("layers", "layers"), ("tensors", "weights")):
        rows = facts[name]
        # A table of groups is only useful if some group has more than one weight.
        if few if name == "tensors" else len(rows) < len(facts["tensors"]):
            print(f"\n{heading}")
            print_rows(rows[:MAX_ROWS])
            if len(rows) > MAX_ROWS:
                print(f"... and {len(rows) - MAX_ROWS} more: --json lists all")
    if not few:
        print(f"\n{len(facts['tensors'])} weights: --json lists each")
    if facts["histogram"]:
        print("\nmagnitudes of the changes")
        print_histogram(facts["histogram"])
    if facts["largest"]:
        print("\nlargest changes")
        print_rows(facts["largest"])
    print_notes(facts["notes"])


def print_histogram(bars: Sequence[Mapping[str, Any]], width: int = 40) -> None:
    """Print a line for each bar; the longest bar has `width` characters.

    Args: bars: each with `from`, `to` (the bounds of the magnitude) and `scalars` (how many).
    """
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    total, most = sum(bar["scalars"] for bar in bars), max(bar["scalars"] for bar in bars)
    for bar in bars:
        below = f"{bar['from']:.0e} to" if bar["from"] else "below"
        shown = f"{below} {bar['to']:.0e}" if bar["to"] else "0"
        length = math.ceil(width * bar["scalars"] / most)
        table.add_row(shown, "#" * length, f"{bar['scalars']:,}", f"{100 * bar['scalars'] / total:.1f}%")
    _print(table)


def print_diagnosis(findings: Sequence[Any], links: Sequence[Mapping[str, Any]]) -> None:
    """Print the results of `sparse-zero doctor`: what is well, the links, then warnings and errors.

    Args: findings: of launcher.doctor.findings; links: rows of a table.
    """
    _print_findings([finding for finding in findings if finding.severity == "ok"])
    if links:
        print()
        print_rows(links)
    problems = [finding for severity in ("warning", "error") for finding in findings if finding.severity == severity]
    if problems:
        print()
        _print_findings(problems)
    counts = {name: sum(finding.severity == name for finding in findings) for name in ("error", "warning")}
    shown = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count]
    print(f"\n{' and '.join(shown) if shown else 'no problems found'}")


def _print_findings(findings: Sequence[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    checks = [finding.check for finding in findings]
    hosts: dict[tuple[str | None, ...], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: checks.index(finding.check)):
        same = (finding.severity, finding.check, finding.message, finding.remedy)
        hosts.setdefault(same, []).extend([finding.host] if finding.host else [])
    table = Table(box=None, show_header=False, pad_edge=False)
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for (severity, check, message, remedy), names in hosts.items():
        shown = (
            ", ".join(names)
            if len(names) <= MAX_NAMES
            else f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more"
        )
        # Hosts answer with what their shells and programs print.
        text = Text(printable(message if remedy is None else f"{message}\n-> {remedy}"))
        table.add_row(Text(severity, style=styles[severity]), check, Text(printable(shown)), text)
    _print(table)


MAX_NAMES = 4
"""Hosts named in one line for the same finding; the others are counted."""


def print_notes(notes: Sequence[str]) -> None:
    """Print each note on a line."""
    for note in notes:
        print(f"note: {printable(note)}")


def readable(name: str, value: Any) -> str:
    """Format a fact for people, as in 12,345 or 1.2 MiB or 0.0312 or 384 x 1536.

    Args: name: an integer whose name ends in `bytes` is a number of bytes; a list whose name is `shape`, a shape.
    """
    return printable(_readable(name, value))


def _readable(name: str, value: Any) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return _readable_bytes(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return (" x " if name == "shape" else ", ").join(map(str, value))
    return printable(str(value))


def _readable_bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{count} bytes"


def _print(table) -> None:
    from rich.console import Console

    # Without these options Rich reads [brackets] and :words: in a path as markup, and cuts a piped table at 80
    # columns.
    width = None if sys.stdout.isatty() else 1000
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)
