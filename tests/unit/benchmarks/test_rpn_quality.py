"""benchmarks/rpn_quality.py without a training run: metrics, data, what is tuned and tested, faults of RPN's code."""

import math
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import rpn

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import rpn_quality as quality
import rpn_quality_plan as planning
import rpn_quality_table as page
import tweeteval


def finished(run: planning.Run, score: float = 0.5) -> dict[str, dict]:
    row = {"score": score, "accuracy": 0.5, "accuracy_without_last_batch": 0.51, "loss": 0.6, "seconds": 60.0}
    return {run.key: {**asdict(run), **row, "device": "CPU", "versions": {"torch": "2"}, "date": "2026-01-01"}}


def settled(rate: dict[str, float], strength_index: int = 1) -> dict[str, dict]:
    """All tuning runs, these rates and strengths the best."""
    done: dict[str, dict] = {}
    for method in planning.METHODS:
        for task in planning.TASKS:
            for name in ("none", *(planning.SELECTIONS if method == "sparse" else ())):
                for run in planning.rate_runs(task, method, name):
                    done |= finished(run, 0.9 if run.learning_rate == rate[method] else 0.1)
        for name in planning.STRENGTHS:
            for index, run in enumerate(planning.strength_runs(method, name, rate[method])):
                done |= finished(run, 0.9 if index == strength_index else 0.1)
    return done


RATE = {"full": 1e-4, "sparse": 3e-3}


def test_first_the_rates_are_tuned_on_validation_tweets() -> None:
    runs = planning.plan({})
    assert {(run.split, run.name) for run in runs} == {("validation", n) for n in ("none", *planning.SELECTIONS)}
    assert {run.name for run in runs[: 3 * 2 * len(planning.TASKS)]} == {"none"}
    assert {(r.task, r.method) for r in runs} == {(t, m) for t in planning.TASKS for m in planning.METHODS}


def test_a_call_may_have_some_of_the_seeds() -> None:
    done, all_seeds = settled(RATE), [*planning.SEEDS]
    given = {"size": 2000, "epochs": 2, "tasks": planning.TASKS, "methods": planning.METHODS, "names": planning.NAMES}
    runs = {n: quality.selected_plan(Namespace(seeds=seeds, **given), done) for n, seeds in ((1, [1]), (5, all_seeds))}
    assert runs[5] == planning.plan(done)
    assert runs[1] == [run for run in runs[5] if run.split == "validation" or run.seed == 1]


def test_each_variant_is_tested_with_the_chosen_rate_and_strength() -> None:
    done = settled(RATE)
    tests = [run for run in planning.plan(done) if run.split == "test"]
    assert all(run.learning_rate == RATE[run.method] for run in tests)
    for run in tests:
        assert run.epochs == (4 if run.name == "none, twice the epochs" else 2)
        noise = planning.noise_of(run.name)
        assert run.strength == (planning.STRENGTHS[noise][1][1] if noise in planning.STRENGTHS else None)
    for method, names in (("full", 13), ("sparse", 16)):
        assert len({r.name for r in tests if r.method == method}) == names
    assert len(tests) == (13 + 16) * len(planning.TASKS) * len(planning.SEEDS)
    first = tests[: 3 * 2 * len(planning.TASKS)]
    assert {(run.name, run.seed) for run in first} == {(name, 0) for name in planning.CORE}


def test_a_part_of_the_plan() -> None:
    runs = planning.plan(settled(RATE), ["emoji"], ["full"], ["none", "rpn"])
    tested = {(r.task, r.method, r.name) for r in runs if r.split == "test"}
    assert tested == {("emoji", "full", "none"), ("emoji", "full", "rpn")}
    assert {r.name for r in runs} == {"none", "rpn"}


def test_a_smaller_experiment_has_the_same_plan_and_its_own_tuning() -> None:
    scale, done = planning.Scale(500, 3), settled(RATE)
    small = {}
    for row in done.values():
        run = scale.run(planning.Run(**{name: row[name] for name in planning.Run.__dataclass_fields__}))
        small |= finished(run, row["score"])
    assert not small.keys() & done.keys()
    assert scale.results(done | small).keys() == done.keys()
    assert scale.results(done) == {}
    assert planning.scales(done | small) == [(2000, 2), (500, 3)]
    tests = [scale.run(run) for run in planning.plan(scale.results(small)) if run.split == "test"]
    assert {(run.name.endswith("epochs"), run.epochs, run.size) for run in tests} == {(False, 3, 500), (True, 6, 500)}


def test_results_are_added_to_a_file_that_can_be_read(tmp_path: Path) -> None:
    one, other = planning.rate_runs("irony", "full")[:2]
    for run in (one, other, one):
        quality.add_result(finished(run, 0.75)[run.key], tmp_path / "r.json")
    assert quality.read_results(tmp_path / "r.json") == finished(one, 0.75) | finished(other, 0.75)
    assert quality.seconds_of(planning.strength_runs("full", "rpn", 1e-4)[0], finished(one), "CPU") == 120
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_page_has_means_deviations_and_paired_differences(tmp_path: Path) -> None:
    done = settled(RATE)
    for run in planning.plan(done, ["irony"], ["full"], ["none", "rpn"]):
        if run.split == "test" and run.seed < 2:
            done |= finished(run, 0.6 + 0.02 * run.seed + (0.01 + 0.02 * run.seed if run.name == "rpn" else 0))
    text = page.write_page(done, tmp_path / "r.json")
    assert (tmp_path / "r.md").read_text() == text
    row = next(line for line in text.splitlines() if line.startswith("| rpn"))
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["rpn", "63.0 ± 2.8 (2)", "+2.0 ± 1.0"]
    assert "5e-05: 10.0, **0.0001: 90.0**, 0.0003: 10.0" in text
    assert "Over 4 test runs that changed the accuracy by +1.00 to +1.00 points" in text


def test_metrics() -> None:
    labels, predicted = [1, 1, 1, 0, 2, 2], [1, 0, 1, 1, 2, 0]
    against, favour, none = 2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 0 + 1), 0.0
    assert tweeteval.score("stance", labels, predicted) == pytest.approx((against + favour) / 2)
    assert tweeteval.score("emotion", labels, predicted) == pytest.approx((against + favour + none) / 3)
    assert tweeteval.score("sentiment", labels, predicted) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert tweeteval.score("irony", [1, 1, 0, 0], [1, 0, 1, 0]) == 0.5
    assert tweeteval.accuracies([0] * 130, [0] * 64 + [1] * 66) == (64 / 130, 0.5)
    assert math.isnan(tweeteval.accuracies([0], [0])[1])


def test_data(tmp_path: Path) -> None:
    for name in ("irony", *(f"stance_{target}" for target in tweeteval.STANCES)):
        (tmp_path / f"{name}_train.csv").write_text(f',text,label\n0,"one, {name}",1\n1,two,0\n')
    (tmp_path / "sentiment_val.csv").write_text(",text,label\n" + "".join(f"{n},t{n},2\n" for n in range(2000)))
    assert tweeteval.part(tmp_path, "irony", "train") == (["one, irony", "two"], [1, 0])
    texts, labels = tweeteval.part(tmp_path, "stance", "train")
    assert (texts[2], labels) == ("atheism: one, stance_atheism", [1, 0] * 5)
    train, validation = (tweeteval.part(tmp_path, "sentiment", part)[0] for part in ("train", "validation"))
    assert (len(train), len(validation)) == (1500, 500)
    assert not set(train) & set(validation)
    assert tweeteval.drawn((texts, labels), 4, 1) == tweeteval.drawn((texts, labels), 4, 1)
    run = planning.Run("irony", "full", "aeda", None, 1e-4, 0, "test", size=2)
    ids, own = quality.training_data(run, tmp_path)
    assert (len(ids), own[:2]) == (4, own[2:])
    assert ids[:2] != ids[2:]


def test_the_carried_mask_is_that_of_the_public_code() -> None:
    """What moves in a step is what the step before has put somewhere; in an epoch's first step it is drawn."""
    noise, keep = quality.CarriedMask(0.3, steps=3, scalars=2 * 5 * 8, seed=0), torch.ones(2, 5, dtype=torch.bool)
    counts = []
    for step in range(6):
        embeddings = torch.arange(80.0).view(2, 5, 8)
        before = noise._mask.clone()
        out = noise(embeddings, keep, rpn.Stream(step=step)).flatten()
        mask, after = before, noise._mask
        changed = out != embeddings.flatten()
        assert not (changed & ~after).any(), "only the targets change"
        if step % 3:
            assert sorted(out[after].tolist()) == mask.nonzero().flatten().tolist(), "the scalars of the mask move"
        counts.append(int(after.sum()))
    assert counts[0] == counts[1] == counts[2]
    assert counts[3] == counts[4] == counts[5]
    assert counts[0] != counts[3]


def test_one_order_and_another_in_each_epoch() -> None:
    runs = {n: planning.Run("irony", "full", n, 0.1, 1e-4, 0, "test") for n in ("rpn", "rpn, one order")}
    first, second = quality.epochs_of(runs["rpn"], list(range(40)))
    assert first != second
    same, again = quality.epochs_of(runs["rpn, one order"], list(range(40)))
    assert same == again == first


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    done, path = quality.read_results(), quality.CACHE.with_suffix(".md")
    assert (path.read_text() if path.exists() else None) == (page.markdown(done) if done else None)
