"""The output of the benchmarks: tables, and in benchmarks/results a JSON file, a page and a plot."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )


def made_on(rows: Iterable[Row]) -> str:
    """The devices, with torch's version, and the first and last date of these rows."""
    rows = list(rows)
    devices = sorted({f"{row['device']} (torch {row['versions']['torch']})" for row in rows})
    dates = sorted({row["date"] for row in rows})
    return ", ".join([*devices, " to ".join(dict.fromkeys(dates[:1] + dates[-1:])) or "no run yet"])


def mebibytes(count: float | None) -> str:
    """MiB, with one decimal below 100."""
    if count is None:
        return ""
    return f"{count / 2**20:,.1f}" if count < 100 * 2**20 else f"{count / 2**20:,.0f}"


def spread(figure: dict[str, float] | None) -> str:
    """The result of `turns.ratio` as text: the median, and the quartiles in brackets."""
    return f"{figure['median']:.3f} [{figure['lower']:.3f}, {figure['upper']:.3f}]" if figure else ""


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


def write_beside(cache: Path, page: str, plot: Callable[[Path], None]) -> str:
    """Write a page (.md) and, if matplotlib is installed, a plot (.png) beside the results.

    Args: plot: writes the file that it is given; raises ImportError without matplotlib.
    Returns: the page, and a line about a plot that is missing.
    """
    cache.with_suffix(".md").write_text(page)
    try:
        plot(cache.with_suffix(".png"))
    except ImportError:
        page += "\nno plot: pip install matplotlib\n"
    return page


def write(
    path: Path, rows: list[Row], page: Callable[[list[Row]], str], plot: Callable[[list[Row], Any], None]
) -> None:
    """Write the rows as JSON, and from them a page (.md) and, if matplotlib is installed, a plot (.png).

    Args: plot: draws on a figure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(rows) + "\n")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    plot(rows, figure)
    figure.savefig(path.with_suffix(".png"), dpi=120)
