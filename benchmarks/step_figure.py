"""Draw the README's figure: time and peak memory of a training step, next to LoRA and full fine-tuning.

    python benchmarks/step_figure.py                  write docs/assets/step.svg from the committed results
    python benchmarks/step_figure.py --out step.svg   write it elsewhere

Reads benchmarks/results/step_time_gpu.json and memory.json, and measures nothing. The SVG is written directly, without
a plotting library, so that the same results give the same bytes.
"""

import argparse
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tables import RESULTS, Row, read

FIGURE = Path(__file__).parents[1] / "docs" / "assets" / "step.svg"

NAMES = {
    "frozen": "frozen model",
    "sparse-16": "sparse-zero, strips",
    "sparse": "sparse-zero",
    "lora": "LoRA (PEFT)",
    "full": "full fine-tuning",
}
COLOURS = {"frozen": "#9aa0a6", "sparse-16": "#7fb2ea", "sparse": "#2f7ed8", "lora": "#e08a1e", "full": "#b04a4a"}

RANKS = 4

WIDTH, PANEL, ROW, BAR = 920, 460, 30, 20
LABELS, BARS, TOP = 160, 225, 66
"""Where a panel's bars begin, how wide the widest is, and where the first row begins, in pixels."""


@dataclass(frozen=True)
class Panel:
    title: str
    setting: str
    values: dict[str, float]
    """By method, in the order of NAMES."""
    format: str


def step_time(results: list[Row]) -> Panel:
    """Seconds of a step over those of the frozen model's forward and backward: medians of the ratios of a round."""
    wanted = {"model": "llama-1b", "targets": "all-linear", "dtype": "bfloat16", "density": 0.01}
    row = next(row for row in results if wanted.items() <= row["setting"].items())
    setting = row["setting"]
    return Panel(
        "Time of a training step, relative to the frozen model",
        f"1B Llama shape, {setting['sequences']} x {setting['tokens']:,} tokens, bfloat16, {row['machine']}",
        {method: row["methods"][method]["over_frozen"]["median"] for method in NAMES},
        "{:.2f}",
    )


def peak_memory(results: list[Row]) -> Panel:
    """Peak of a step on one of RANKS ranks in MiB: weights, optimizer, activations and the largest temporary tensors.

    The frozen model has no optimizer to partition; its peak is that of one rank.
    """
    wanted = {"model": "llama-120m", "targets": "all-linear", "dtype": "bfloat16", "density": 0.01, "device": "cpu"}
    row = next(row for row in results if wanted.items() <= row["options"].items())
    runs = {run["method"]: run for run in row["runs"] if run["way"] == "zero2" and run["count"] == RANKS}
    runs["frozen"] = next(run for run in row["runs"] if run["method"] == "frozen")
    return Panel(
        "Peak memory of a training step, MiB",
        f"120M Llama shape, 1 x {row['options']['tokens']:,} tokens, bfloat16, CPU, {RANKS} ranks, ZeRO stage 2",
        {method: max(rank["peak"] for rank in runs[method]["ranks"]) / 2**20 for method in NAMES},
        "{:,.0f}",
    )


def draw(panels: list[Panel]) -> str:
    """The panels side by side, as an SVG document."""
    height = TOP + ROW * len(NAMES) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#24292f">',
        f"<title>{escape('; '.join(panel.title for panel in panels))}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, PANEL * index + 12)
    note = (
        "1% of all linear layers; LoRA with as many trainable scalars and PEFT's defaults; "
        "strips: sparse.granularity: 16. Shorter is better."
    )
    parts += [f'<text x="12" y="{height - 12}" font-size="12" fill="#57606a">{note}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, left: int) -> list[str]:
    parts = [
        f'<text x="{left}" y="26" font-size="15" font-weight="bold">{escape(panel.title)}</text>',
        f'<text x="{left}" y="46" font-size="12" fill="#57606a">{escape(panel.setting)}</text>',
    ]
    largest = max(panel.values.values())
    for place, (method, value) in enumerate(panel.values.items()):
        top = TOP + ROW * place
        width, middle, fill = BARS * value / largest, top + BAR - 5, COLOURS[method]
        weight = ' font-weight="bold"' if method.startswith("sparse") else ""
        parts += [
            f'<text x="{left + LABELS - 8}" y="{middle}" text-anchor="end"{weight}>{escape(NAMES[method])}</text>',
            f'<rect x="{left + LABELS}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2" fill="{fill}"/>',
            f'<text x="{left + LABELS + width + 6:.1f}" y="{middle}"{weight}>{panel.format.format(value)}</text>',
        ]
    return parts


def figure() -> str:
    return draw(
        [step_time(read(RESULTS / "step_time_gpu.json")), peak_memory(read(RESULTS / "memory.json"))],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURE, help="the SVG file to write (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(figure())


if __name__ == "__main__":
    main()
