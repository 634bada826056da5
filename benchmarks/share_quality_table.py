"""Makes the page and the plot of share_quality.py from its runs."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import share_quality_plan as quality
from noise_quality_table import mean_and_deviation, percent_by_seed, points
from share_quality_plan import DRAWN, FULL, FULL_SCALE, HEAD, LORA, METRICS, SCATTERED, SHARES, TASKS, Cell, Row, Scale
from tables import made_on, table, write_beside

NAMES = {
    SCATTERED: "scattered scalars",
    "tenth": "within a tenth of the columns",
    "whole": "whole columns",
    LORA: "LoRA, as many scalars",
    FULL: "full fine-tuning",
    HEAD: "head only",
}
LABELS = {"rotten-tomatoes": "Rotten Tomatoes", "cola": "CoLA"}

Scores = dict[int, float]
"""By seed."""


def tested(task: str, cell: Cell, scale: Scale, done: dict[str, Row]) -> dict[int, Row]:
    """The test runs at the chosen rate, by seed."""
    return {run.seed: done[run.key] for run in quality.tests(task, cell, scale, done) if run.key in done}


def scores(rows: dict[int, Row]) -> Scores:
    return {seed: row["score"] for seed, row in rows.items()}


def markdown(done: dict[str, Row]) -> str:
    parts = [_introduction(done)]
    for scale in quality.scales(done):
        parts += _sections(scale, done)
    return "\n\n".join(parts) + "\n"


def _introduction(done: dict[str, Row]) -> str:
    return (
        "# A random subset of the weights: quality by share\n\n"
        "MiniLM-L6, all linear layers and the classification head, batches of 16, AdamW, linear decay after 6% "
        "warmup, bfloat16 autocast; Rotten Tomatoes: 1,000 test sentences, CoLA: the 1,043 of both development files. "
        f"Made by `python benchmarks/share_quality.py --data cola` on {made_on(done.values())}.\n\n"
        "Each method has at each share the rate that is best on 1,000 validation sentences: three rates, one "
        "run each, up to two more where the best is at the edge, and a second run where scores are within two points. "
        "Mean ± "
        f"standard deviation over {len(quality.SEEDS)} seeds, or as many as are in brackets. A difference is the mean "
        "of those by seed, in points, ± its standard error; with two seeds a 95% interval reaches 12.7 errors to each "
        "side, with three 4.3. All runs share one test set, which the errors do not contain: the standard error of an "
        "accuracy of 75% on 1,000 sentences is 1.4 points."
    )


def _sections(scale: Scale, done: dict[str, Row]) -> list[str]:
    tasks = [task for task in TASKS if any(run.key in done for run in quality.plan(done, scale, [task]))]
    sizes = ", ".join(f"{scale.size * quality.TIMES[task]:,} training sentences of {LABELS[task]}" for task in tasks)
    title = f"## {sizes[0].upper()}{sizes[1:]}, {scale.epochs} epochs"
    parts = [title]
    if scale != FULL_SCALE:
        command = f"`--size {scale.size} --epochs {scale.epochs}`"
        parts.append(f"A smaller experiment than the benchmark's own ({command}), for lack of time on this machine.")
    for task in tasks:
        parts.append(f"### {LABELS[task]}: {METRICS[task]}, percent\n\n" + _quality(task, scale, done))
    parts.append("### Best rate by share and task\n\n" + _rates(tasks, scale, done))
    parts.append("### Validation scores by rate\n\n" + _tuning(tasks, scale, done))
    return [*parts, _missing(tasks, scale, done)]


def _quality(task: str, scale: Scale, done: dict[str, Row]) -> str:
    found = {cell: tested(task, cell, scale, done) for cell in quality.CELLS}
    rows = []
    for method in (SCATTERED, *DRAWN, LORA):
        cells = [found.get(Cell(method, share), {}) for share in SHARES]
        rows.append([NAMES[method], *(_percent(scores(each)) for each in cells)])
        if method != SCATTERED:
            base = [scores(found[Cell(SCATTERED, share)]) for share in SHARES]
            differences = [points(scores(one), other) or "-" for one, other in zip(cells, base, strict=True)]
            rows.append([f"{method} - scattered", *differences])
    for method in (SCATTERED, LORA):
        counts = [_trained(found[Cell(method, share)].values()) for share in SHARES]
        rows.append([f"trained, {method}", *counts])
    others = [
        f"{NAMES[cell.method]} ({_trained(found[cell].values())} scalars): {_percent(scores(found[cell]))}"
        for cell in (Cell(FULL, 1), Cell(HEAD, 0))
        if found[cell]
    ]
    return table(["", *(f"{share:.1%}" for share in SHARES)], rows) + (
        "\n\n" + "; ".join(others) + "." if others else ""
    )


def _percent(found: Scores) -> str:
    return percent_by_seed(found, len(quality.SEEDS)) or "-"


def _trained(rows: Iterable[Row]) -> str:
    return next((f"{row['trainable']:,}" for row in rows), "-")


def _rates(tasks: list[str], scale: Scale, done: dict[str, Row]) -> str:
    """The table for docs/choosing."""
    rows = []
    for task in tasks:
        for method in quality.METHODS:
            cells = {cell.share: cell for cell in quality.CELLS if cell.method == method}
            if method in (FULL, HEAD):
                continue
            row = [f"{LABELS[task]}, {NAMES[method]}"]
            for share in SHARES:
                row.append(_rate(task, cells[share], scale, done) if share in cells else "-")
            rows.append(row)
    text = table(["", *(f"{share:.1%}" for share in SHARES)], rows)
    for cell in (Cell(FULL, 1), Cell(HEAD, 0)):
        known = [f"{LABELS[task]} {_rate(task, cell, scale, done)}" for task in tasks]
        text += f"\n\n{NAMES[cell.method].capitalize()}: {', '.join(known)}."
    text += "\n\nIn brackets the rates that were tried; +: the best is the largest of them, -: the smallest."
    if " =" in text:
        text += " =: drawn columns that were not tuned, but tested at the rate of scattered scalars."
    return text


def _rate(task: str, cell: Cell, scale: Scale, done: dict[str, Row]) -> str:
    chosen = quality.chosen_rate(task, cell, scale, done)
    if chosen is None:
        return "-"
    rate, is_tuned = chosen
    if not is_tuned:
        return f"{rate:g} ="
    tried = [run.learning_rate for run in quality.rate_runs(task, cell, scale, done) if run.key in done]
    edge = "+" if rate == max(tried) else "-" if rate == min(tried) else ""
    return f"{rate:g}{edge} ({min(tried):g} to {max(tried):g})"


def _tuning(tasks: list[str], scale: Scale, done: dict[str, Row]) -> str:
    rows = []
    for task in tasks:
        for cell in quality.CELLS:
            runs = quality.rate_runs(task, cell, scale, done)
            second = {run.learning_rate: run.key for run in quality.deciding_runs(task, cell, scale, done)}
            if not any(run.key in done for run in runs):
                continue
            chosen, texts = quality.chosen_rate(task, cell, scale, done), []
            for run in runs:
                rows_of_rate = [done[key] for key in (run.key, second.get(run.learning_rate)) if key in done]
                shown = ", ".join(f"{100 * row['score']:.1f} ({row['loss']:.3f})" for row in rows_of_rate)
                text = f"{run.learning_rate:g}: {shown or '-'}"
                texts.append(f"**{text}**" if chosen == (run.learning_rate, True) else text)
            share = f", {cell.share:.1%}" if 0 < cell.share < 1 else ""
            rows.append([f"{LABELS[task]}, {NAMES[cell.method]}{share}", ", ".join(texts)])
    return "Percent, in brackets the loss; behind the comma a second seed; the chosen is bold.\n\n" + table(
        ["", ""], rows
    )


def _missing(tasks: list[str], scale: Scale, done: dict[str, Row]) -> str:
    known = quality.plan(done, scale, tasks)
    missing = sum(run.key not in done for run in known)
    return f"Missing: {missing} of the {len(known)} runs that are known so far. Not yet tuned cells are not counted."


def plot(done: dict[str, Row], path: Path) -> None:
    """Quality over trained scalars, a panel for each task, of its scale with the most tests. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(11, 4.2), layout="constrained")
    for panel, task in zip(panels, TASKS, strict=True):
        scale = max(quality.scales(done), key=partial(_tests, task, done), default=FULL_SCALE)
        found = {cell: tested(task, cell, scale, done) for cell in quality.CELLS}
        draw_curves(panel, found, lambda row: 100 * row["score"])
        panel.set_ylabel(f"test {METRICS[task]}, percent")
        panel.set_title(f"{LABELS[task]}, {scale.size * quality.TIMES[task]:,} sentences, {scale.epochs} epochs")
    panels[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curves(axes: Any, found: dict[Cell, dict[int, Row]], value: Callable[[Row], float]) -> None:
    """For each method a value over the trained scalars: mean and standard deviation over the seeds.

    Args: found: of each cell the runs by seed.
    """
    for number, method in enumerate(quality.METHODS):
        points = []
        for cell in sorted(cell for cell, rows in found.items() if cell.method == method and rows):
            rows = [*found[cell].values()]
            mean, deviation = mean_and_deviation(map(value, rows))
            points.append((rows[0]["trainable"], mean, deviation or 0))
        x, y, deviations = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(x, y, deviations, fmt="o-", capsize=3, color=f"C{number}", label=NAMES[method])
    axes.set(xscale="log", xlabel="trained scalars")
    axes.grid(alpha=0.3)


def _tests(task: str, done: dict[str, Row], scale: Scale) -> int:
    """The number of test runs."""
    return sum(len(tested(task, cell, scale, done)) for cell in quality.CELLS)


def write_page(done: dict[str, Row], cache: Path) -> str:
    """Write page and plot beside the results. Returns: the page."""
    return write_beside(cache, markdown(done), partial(plot, done))
