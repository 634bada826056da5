"""The figure of a comparison: quality against memory, time and forgetting. Needs matplotlib."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def draw(summary: Mapping[str, Any], path: Path) -> bool:
    """Write the figure. Returns: False if matplotlib is not installed or there is nothing to draw."""
    rows = [each for each in summary["methods"] if each.get("quality")]
    if not rows or find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "peak memory of a rank, GiB": [(max(each["peak_memory_bytes_per_rank"]) / 2**30, None) for each in rows],
        "training, seconds": [(each["seconds"]["mean"], each["seconds"]["deviation"]) for each in rows],
    }
    if all(each["forgetting"] for each in rows):
        changes = [(each["forgetting"]["mean"], each["forgetting"]["deviation"]) for each in rows]
        panels["change of the loss on the text, nats per token"] = changes
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for each, (x, deviation) in zip(rows, values, strict=True):
            quality = each["quality"]
            axis.errorbar(
                x, quality["mean"], xerr=deviation, yerr=quality["deviation"], fmt="o", capsize=3, label=each["name"]
            )
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"test {summary['metric'].replace('_', ' ')}")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True
