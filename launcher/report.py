"""How the subcommands print: tables for people, one JSON value for programs, one line for an error."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PROGRAM = "sparse-zero"


def say_error(message: str) -> None:
    """One line on stderr, however many lines `message` has."""
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def only_json_on_stdout(wanted: bool) -> Iterator[None]:
    """With `wanted`, what libraries print within this block goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """`value` on stdout; anything that JSON has no form for as a string."""
    print(json.dumps(value, indent=2, default=str))


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A title, then a line for each fact."""
    from rich.table import Table

    print(title)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name.replace("_", " "), readable(name, fact))
    _print(table)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a column for each key of the first row."""
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(readable(name, value) for name, value in row.items()))
    _print(table)


MOST_ROWS = 30
"""What longer tables have is left to --json."""


def print_description(title: str, facts: Mapping[str, Any]) -> None:
    """What `sparse_zero.adapters.inspection.describe` found."""
    tables = ("kinds", "layers", "tensors", "histogram", "largest", "notes")
    print_facts(
        title, {name: fact for name, fact in facts.items() if name not in tables and fact not in (None, {}, [])}
    )
    few = len(facts["tensors"]) <= MOST_ROWS
    for name, heading in (("kinds", "weights of each kind"), ("layers", "layers"), ("tensors", "weights")):
        rows = facts[name]
        # Groups of one weight each tell nothing more than the weights do.
        if few if name == "tensors" else len(rows) < len(facts["tensors"]):
            print(f"\n{heading}")
            print_rows(rows[:MOST_ROWS])
            if len(rows) > MOST_ROWS:
                print(f"... and {len(rows) - MOST_ROWS} more: --json lists all")
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
    """A line for each bar, the longest `width` characters long. Args: bars: `from`, `to`, `scalars` of each."""
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
    """What `sparse-zero doctor` found, what is wrong last.

    Args: findings: launcher.doctor.findings.Finding; links: rows.
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
    said = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count]
    print(f"\n{' and '.join(said) if said else 'nothing is wrong'}")


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
            if len(names) <= MOST_NAMES
            else f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
        )
        told = Text(message if remedy is None else f"{message}\n-> {remedy}")
        table.add_row(Text(severity, style=styles[severity]), check, Text(shown), told)
    _print(table)


MOST_NAMES = 4
"""Hosts that say the same; of more, a line names these and counts the rest."""


def print_notes(notes: Sequence[str]) -> None:
    """What a user must know beside the facts."""
    for note in notes:
        print(f"note: {note}")


def readable(name: str, value: Any) -> str:
    """A fact as people write it: 12,345 scalars, 1.2 MiB, 0.0312, 384 x 1536."""
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
    return str(value)


def _readable_bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{count} bytes"


def _print(table) -> None:
    from rich.console import Console

    # Rich would read [brackets] and :words: of a path as markup, and cut a piped table at 80 columns.
    width = None if sys.stdout.isatty() else 1000
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)
