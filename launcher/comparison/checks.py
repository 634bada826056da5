"""Checks the recipes of a comparison's variants before the first run: one that is refused ends it at once. Slurm may
train on machines that have what this one has not: that is said.

In a process of its own, which imports torch: `python -m launcher.comparison.checks` with one JSON value on stdin, for
each variant its name, the recipe's path and the overrides.
"""

import json
import subprocess
import sys

from launcher import report
from launcher.comparison.directory import RESULTS_FILE
from launcher.comparison.runs import problem_of
from launcher.comparison.variants import Comparison
from launcher.run_commands import check_settings
from sparse_zero.errors import UserError
from sparse_zero.quantized.quiet_imports import silence_imports
from sparse_zero.recipe.recipe import load_recipe


def check_variants(comparison: Comparison) -> None:
    """Raise UserError, which names the variant, if one of those that have not run would be refused."""
    given = []
    for variant in comparison.variants:
        run = comparison.run(variant, variant.rates[0], comparison.seeds[0])
        if not (run.directory / RESULTS_FILE).exists():
            given.append([variant.name, comparison.path, list(run.overrides)])
    if not given:
        return
    words = [sys.executable, "-P", "-m", "launcher.comparison.checks"]
    done = subprocess.run(words, input=json.dumps(given), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(problem_of(done.stderr, done.returncode))
    for line in done.stderr.splitlines():
        if line.startswith(f"{report.PROGRAM}: not checked"):
            print(line, file=sys.stderr)


def main() -> int:
    silence_imports()
    for name, path, overrides in json.load(sys.stdin):
        try:
            recipe = load_recipe(path, overrides)
            check_settings(recipe, as_json=True, everything=recipe.launch.launcher != "slurm")
        except UserError as error:
            report.say_error(f"{name}: {error}")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
