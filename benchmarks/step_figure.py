"""Draw the README's figure: time and peak memory of a training step, next to LoRA and full fine-tuning.

    python benchmarks/step_figure.py                  write docs/assets/step.svg from the committed results
    python benchmarks/step_figure.py --out step.svg   write it elsewhere

Reads benchmarks/results/gpu.jsonl, and step_time_gpu.json for full fine-tuning, and measures nothing. The SVG is
written directly, without a plotting library, so that the same results give the same bytes.
"""

import argparse
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gpu import read_records
from tables import RESULTS, Row, read

FIGURE = Path(__file__).parents[1] / "docs" / "assets" / "step.svg"

NAMES = {
    "frozen": "frozen model",
    "whole": "sparse-zero, whole columns",
    "columns": "sparse-zero, 10% of columns",
    "sparse": "sparse-zero, all columns",
    "lora-bf16": "LoRA in bfloat16",
    "lora": "LoRA (PEFT's default)",
    "full": "full fine-tuning",
}
COLOURS = {
    "frozen": "#9aa0a6", "whole": "#2f7ed8", "columns": "#2f7ed8", "sparse": "#7fb2ea", "lora-bf16": "#f0b878",
    "lora": "#e08a1e", "full": "#b04a4a",
}  # fmt: skip

WIDTH, PANEL, ROW, BAR = 980, 490, 30, 20
LABELS, BARS, TOP = 220, 195, 66
"""Where a panel's bars begin, how wide the widest is, and where the first row begins, in pixels."""


@dataclass(frozen=True)
class Panel:
    title: str
    setting: str
    values: dict[str, float]
    """By method, in the order of NAMES."""
    format: str


def measured(records: list[Row], size: str) -> tuple[dict[str, Row], str]:
    """The rows by method of the newest steps of all linear layers, and the card. Args: size: 1B or 7B."""
    record = [each for each in records if each["figure"] == f"step, {size}, all linear: ours and LoRA"][-1]
    return {row["method"]: row for row in record["rows"]}, record["card"]


def step_time(records: list[Row], older: list[Row]) -> Panel:
    """Seconds of a step over those of the frozen model's forward and backward: medians of the ratios of a round.

    Args: older: the results of step_time.py, for full fine-tuning, which `records` do not have.
    """
    rows, card = measured(records, "1B")
    values = {method: row["/ frozen"] for method, row in rows.items()}
    wanted = {"model": "llama-1b", "targets": "all-linear", "dtype": "bfloat16", "density": 0.01}
    row = next(row for row in older if wanted.items() <= row["setting"].items())
    values["full"] = row["methods"]["full"]["over_frozen"]["median"]
    return Panel(
        "Time of a training step, relative to the frozen model",
        f"1B Llama shape, 4 x 2,048 tokens, bfloat16, {card}",
        {method: values[method] for method in NAMES},
        "{:.2f}",
    )


def step_memory(records: list[Row]) -> Panel:
    """What a step takes beyond weights and optimizer, in GiB."""
    rows, card = measured(records, "7B")
    return Panel(
        "Memory of a step beyond weights and optimizer, GiB",
        f"7B Llama shape, 2 x 2,048 tokens, bfloat16, {card}",
        {method: rows[method]["GiB of a step"] for method in NAMES if method in rows},
        "{:.1f}",
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
        "1% of all linear layers; LoRA with as many trainable scalars. PEFT keeps its matrices in float32 by default. "
        "Shorter is better."
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
        weight = ' font-weight="bold"' if method in ("whole", "columns", "sparse") else ""
        parts += [
            f'<text x="{left + LABELS - 8}" y="{middle}" text-anchor="end"{weight}>{escape(NAMES[method])}</text>',
            f'<rect x="{left + LABELS}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2" fill="{fill}"/>',
            f'<text x="{left + LABELS + width + 6:.1f}" y="{middle}"{weight}>{panel.format.format(value)}</text>',
        ]
    return parts


def figure() -> str:
    records = read_records(RESULTS / "gpu.jsonl")
    return draw([step_time(records, read(RESULTS / "step_time_gpu.json")), step_memory(records)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURE, help="the SVG file to write (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(figure())


if __name__ == "__main__":
    main()
