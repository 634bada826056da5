"""`sparse-zero compare`: run a recipe with several methods, rates and seeds, and write what came out."""

import argparse
from collections.abc import Callable

from launcher import report
from launcher.comparison import checks, directory, figure, runs, summary, table
from launcher.comparison.runs import Ended, Interrupted, Progress
from launcher.comparison.variants import Comparison, Run, describe, directory_of
from launcher.ways import preflight
from sparse_zero.errors import UserError
from sparse_zero.ranks.stop_signals import STOPPED

DEFAULTS = {"methods": ["sparse", "lora", "full"], "seeds": 3}

Execute = Callable[[Comparison, Run], Ended]


def compare(arguments: argparse.Namespace) -> int:
    """Compare methods on a recipe. Returns: 0; 1 if a run failed; that of a signal if one stopped the runs."""
    asked = {name: getattr(arguments, name) for name in ("methods", "rates", "seeds", "budget", "text")}
    if arguments.resume:
        asked = directory.with_earlier(directory_of(arguments.recipe, arguments.out), asked)
    asked |= {name: default for name, default in DEFAULTS.items() if asked[name] is None}
    comparison = describe(arguments.recipe, arguments.overrides, out=arguments.out, **asked)
    preflight.check(comparison.recipe)
    checksum = directory.open_directory(comparison, arguments.resume)
    checks.check_variants(comparison)
    directory.write_comparison(comparison, asked, checksum)
    try:
        found = run_all(comparison, runs.execute)
    except Interrupted as interrupted:
        report.say_warning(f"{comparison.out}: stopped; go on with --resume")
        return interrupted.status or STOPPED
    has_figure = figure.draw(found, comparison.out / "compare.png")
    directory.write_json(comparison.out / "compare.json", found)
    (comparison.out / "compare.md").write_text(table.markdown(found, has_figure), encoding="utf-8")
    if arguments.json:
        report.print_json(found)
    else:
        report.print_rows(table.table_rows(found))
        print(f"\n{found['says']}")
        report.print_notes(table.notes(found))
        print(f"written: {comparison.out / 'compare.md'}, compare.json{', compare.png' if has_figure else ''}")
        if not has_figure:
            report.print_notes(["no figure: matplotlib is not installed (sparse-zero[compare])"])
    return 1 if any(each["failed"] for each in found["methods"]) else 0


def run_all(comparison: Comparison, execute: Execute) -> dict:
    """Execute the runs of a comparison: each rate with the first seed, then the other seeds with the best rate.

    Args: execute: runs one of them, or reads the results of one that is done.

    Returns: the content of compare.json.

    Raises UserError: no run has succeeded, for the reason of the first one.
    Raises Interrupted: a signal.
    """
    progress, ended = Progress(comparison.run_count), []
    left = [v.name for v in comparison.variants for _ in range(len(v.rates) + len(comparison.seeds) - 1)]

    def run(found: Run) -> Ended:
        with progress.running(found, left):
            end = execute(comparison, found)
        left.remove(found.variant)
        ended.append(end)
        if end.problem is not None:
            report.say_warning(f"{found.title} failed: {end.problem}")
        return end

    metric, rows = None, []
    first, *others = comparison.seeds
    try:
        for variant in comparison.variants:
            own = [run(comparison.run(variant, rate, first)) for rate in variant.rates]
            done = {end.run.rate: end.results for end in own if end.results}
            if metric is None and done:
                metric = summary.metric_of(comparison, next(iter(done.values())))
            rate = summary.choose_rate(metric, done) if metric else None
            for seed in others:
                if rate is None:
                    left.remove(variant.name)
                    progress.skip()
                else:
                    own.append(run(comparison.run(variant, rate, seed)))
            rows.append((variant, rate, own))
    finally:
        progress.close()
    if metric is None:
        raise UserError(f"{comparison.out}: no run has succeeded: {ended[0].problem}")
    facts = [summary.row(variant, metric, rate, own) for variant, rate, own in rows]
    return summary.summarise(comparison, metric, facts, ended)
