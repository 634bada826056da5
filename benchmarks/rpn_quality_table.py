"""Makes the page and the plot of rpn_quality.py from its runs."""

from functools import partial
from pathlib import Path

import rpn_quality_plan as quality
from noise_quality_table import paired_difference, percent_by_seed, points
from rpn_quality_plan import Row
from tables import made_on, table, write_beside
from tweeteval import METRICS, TASKS

Scores = dict[int, float]
"""By seed."""


def scores_of_tests(done: dict[str, Row]) -> dict[tuple[str, str, str], Scores]:
    """The results of the test runs in the plan, by (task, method, variant)."""
    cells: dict[tuple[str, str, str], Scores] = {}
    for run in quality.plan(done):
        if run.split == "test" and run.key in done:
            cells.setdefault((run.task, run.method, run.name), {})[run.seed] = done[run.key]["score"]
    return cells


def markdown(done: dict[str, Row]) -> str:
    parts = [_introduction(done)]
    for scale in quality.scales(done):
        parts += _sections(scale, scale.results(done))
    return "\n\n".join([*parts, "## Tests without the last batch\n\n" + _last_batch(done)]) + "\n"


def _sections(scale: quality.Scale, done: dict[str, Row]) -> list[str]:
    """Args: done: the results of the scale, by the keys of the plan."""
    cells, parts = scores_of_tests(done), []
    title = f"{scale.size:,} training tweets, {scale.epochs} epochs"
    for method in quality.METHODS:
        tasks = [task for task in TASKS if any(key[:2] == (task, method) for key in cells)]
        if not tasks:
            continue
        rows = []
        for name in quality.NAMES:
            if any((task, method, name) in cells for task in tasks):
                row = [name]
                for task in tasks:
                    scores, none = cells.get((task, method, name), {}), cells.get((task, method, "none"), {})
                    row += [
                        percent_by_seed(scores, len(quality.SEEDS)),
                        "" if name == "none" else points(scores, none),
                    ]
                rows.append(row)
        header = ["variant", *(column for task in tasks for column in (task, "- none"))]
        parts.append(f"## {method.capitalize()} fine-tuning, {title}\n\n" + table(header, rows))
    return [*parts, f"## Tuning, {title}\n\n" + _tuning(done), _missing(done)]


def _introduction(done: dict[str, Row]) -> str:
    metrics = "; ".join(f"{task}: {METRICS[task]}" for task in TASKS)
    return (
        "# Random Position Noise on the tasks of its paper\n\n"
        "MiniLM-L6, at most 2,000 tweets of the test part, batches of 16, bfloat16 autocast, AdamW; made by "
        f"`python benchmarks/rpn_quality.py --data tweeteval` on {made_on(done.values())}.\n\n"
        f"Metrics, in percent: {metrics}. Each cell: mean ± standard deviation over five seeds, or as many as are in "
        "brackets. `- none`: mean of the differences to `none` by seed, in points, ± its standard error; with two "
        "seeds a 95% interval reaches 12.7 errors to each side, with three 4.3, with five 2.8."
    )


def _tuning(done: dict[str, Row]) -> str:
    rows = []
    for method in quality.METHODS:
        for task in TASKS:
            runs = quality.rate_runs(task, method)
            if any(run.key in done for run in runs):
                rows.append([f"{method}, {task}: learning rate", _scores(runs, "learning_rate", done)])
            for name in quality.SELECTIONS if method == "sparse" else ():
                runs = quality.rate_runs(task, method, name)
                if any(run.key in done for run in runs):
                    rows.append([f"{method}, {task}, {name}: learning rate", _scores(runs, "learning_rate", done)])
        if chosen := quality.best(quality.rate_runs(quality.TUNED_ON, method), done):
            for name, (setting, _) in quality.STRENGTHS.items():
                runs = quality.strength_runs(method, name, chosen.learning_rate)
                if any(run.key in done for run in runs):
                    rows.append([f"{method}, {name}: {setting}", _scores(runs, "strength", done)])
    return (
        "Score on validation tweets, one seed; the best is bold. Strengths are chosen on "
        f"{quality.TUNED_ON} and used for all tasks.\n\n" + table(["", ""], rows)
        if rows
        else "No run yet."
    )


def _scores(runs: list[quality.Run], setting: str, done: dict[str, Row]) -> str:
    chosen, texts = quality.best(runs, done), []
    for run in runs:
        text = f"{getattr(run, setting):g}: " + (f"{100 * done[run.key]['score']:.1f}" if run.key in done else "-")
        texts.append(f"**{text}**" if run == chosen else text)
    return ", ".join(texts)


def _last_batch(done: dict[str, Row]) -> str:
    rows = [row for row in done.values() if row["split"] == "test"]
    gaps = [row["accuracy_without_last_batch"] - row["accuracy"] for row in rows]
    if not gaps:
        return "No run yet."
    return (
        f"RPN's public code tests in batches of 128 and leaves out the last one. Over {len(gaps)} test runs that "
        f"changed the accuracy by {100 * min(gaps):+.2f} to {100 * max(gaps):+.2f} points, on average by "
        f"{100 * sum(gaps) / len(gaps):+.2f}."
    )


def _missing(done: dict[str, Row]) -> str:
    known = quality.plan(done)
    missing = sum(run.key not in done for run in known)
    return f"Missing: {missing} of the {len(known)} runs that are known so far. Not yet tuned tasks are not counted."


def plot(done: dict[str, Row], path: Path) -> None:
    """Differences to no noise with standard errors, of the largest scale, a panel for each method.

    Raises ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = next(iter(quality.scales(done)), quality.Scale())
    cells = scores_of_tests(largest.results(done))
    names = [name for name in quality.NAMES if name != "none" and any(key[2] == name for key in cells)]
    figure, panels = pyplot.subplots(1, len(quality.METHODS), figsize=(11, 4), sharey=True, layout="constrained")
    for panel, method in zip(panels, quality.METHODS, strict=True):
        panel.axhline(0, color="black", linewidth=0.8)
        for place, name in enumerate(names):
            for index, task in enumerate(TASKS):
                none = cells.get((task, method, "none"), {})
                mean, error = paired_difference(cells.get((task, method, name), {}), none)
                if mean is not None:
                    x = index + (place - (len(names) - 1) / 2) * 0.8 / max(len(names), 1)
                    panel.errorbar([x], [100 * mean], [100 * (error or 0)], fmt="o", capsize=3, color=f"C{place}")
            panel.plot([], [], "o", color=f"C{place}", label=name)
        panel.set_title(f"{method} fine-tuning")
        panel.set_xticks(range(len(TASKS)), TASKS, rotation=30)
    panels[0].set_ylabel("score - none, points")
    panels[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_page(done: dict[str, Row], cache: Path) -> str:
    """Write page and plot beside the results. Returns: the page."""
    return write_beside(cache, markdown(done), partial(plot, done))
