"""benchmarks/columns_quality.py without a training run: which rate is tested, and the committed page."""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import columns_quality as quality
import noise_quality_plan as planning


def finished(columns: float | str, run: planning.Run, accuracy: float) -> quality.Done:
    row = asdict(run) | {"columns": str(columns), "accuracy": accuracy, "loss": 0.5, "trainable": 9, "device": "CPU"}
    return {(str(columns), run.key): row}


def tuned(accuracies: tuple[float, float, float]) -> quality.Done:
    done: quality.Done = {}
    for columns in quality.COLUMNS:
        for run, accuracy in zip(quality.tuning_runs(quality.TESTED), accuracies, strict=True):
            done |= finished(columns, run, accuracy)
    return done


def test_the_best_rate_is_tested_on_five_seeds() -> None:
    planned = quality.plan(tuned((0.7, 0.8, 0.5)), others=False)
    tests = [(columns, run) for columns, run in planned if run.split == "test"]
    assert {run.learning_rate for _, run in tests} == {3e-3}
    assert {(columns, run.seed) for columns, run in tests} == {
        (columns, seed) for columns in quality.COLUMNS for seed in planning.SEEDS
    }


def test_a_second_seed_decides_between_close_rates() -> None:
    done = tuned((0.768, 0.767, 0.5))
    deciding = quality.deciding_runs("whole", done)
    assert [(run.learning_rate, run.seed, run.split) for run in deciding] == [
        (1e-3, quality.SECOND_SEED, "validation"),
        (3e-3, quality.SECOND_SEED, "validation"),
    ]
    assert quality.chosen("whole", done) is None
    for run, accuracy in zip(deciding, (0.72, 0.75), strict=True):
        done |= finished("whole", run, accuracy)
    assert quality.chosen("whole", done).learning_rate == 3e-3


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    text = quality.page(quality.finished(quality.CACHE)) + "\n"
    assert text == quality.CACHE.with_suffix(".md").read_text()
