"""The measured tables of the page on evidence are those that the benchmarks wrote."""

import re
from pathlib import Path

from docs_pages import ROOT


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_the_figures_are_those_of_the_results() -> None:
    shown = re.findall(r"!\[.+\]\((assets/\w+\.png)\)", (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8"))
    assert shown
    for figure in shown:
        written = ROOT / "benchmarks" / "results" / Path(figure).name
        assert (ROOT / "docs" / figure).read_bytes() == written.read_bytes()


def test_rows_with_deviations_are_in_the_results() -> None:
    results = ROOT / "benchmarks" / "results"
    pages = [path.read_text(encoding="utf-8") for path in (*results.glob("*_quality.md"), results / "gsm8k_share.md")]
    written = [cells(line) for page in pages for line in page.splitlines() if line.startswith("|")]
    shown = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()
    measured = [cells(line) for line in shown if line.startswith("|") and " ± " in line]
    assert len(measured) >= 3
    assert [row for row in measured if row not in written] == []
