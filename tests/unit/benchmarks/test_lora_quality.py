"""benchmarks/lora_quality.py without a training run: what is tuned and tested, LoRA's size, the page."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import lora_quality as quality
import noise_quality_plan as planning


def finished(run: planning.Run, accuracy: float = 0.8) -> dict[str, dict]:
    return {run.key: {**asdict(run), "accuracy": accuracy, "loss": 0.5, "trainable": 1000}}


def tuned(best: float) -> dict[str, dict]:
    done: dict[str, dict] = {}
    for run in quality.tuning_runs():
        done |= finished(run, 0.9 if run.learning_rate == best else 0.7)
    return done


def test_nothing_is_tested_before_the_learning_rate_is_chosen() -> None:
    assert quality.plan({}) == quality.tuning_runs()
    assert {run.split for run in quality.plan({})} == {"validation"}


def test_the_best_rate_on_validation_sentences_is_tested_on_every_size_and_seed() -> None:
    tested = [run for run in quality.plan(tuned(3e-3)) if run.split == "test"]
    assert {run.learning_rate for run in tested} == {3e-3}
    assert {(run.size, run.seed) for run in tested} == {
        (size, seed) for size in planning.SIZES for seed in planning.SEEDS
    }


def test_lora_has_about_as_many_scalars_as_the_sparse_runs() -> None:
    run = quality.tuning_runs()[0]
    try:
        base = package_path(run.base_model)
    except UserError as error:
        pytest.skip(str(error))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    budget = run.density * sum(p.numel() for p in model.parameters())
    adapted = quality.lora(model, run)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == pytest.approx(budget, rel=0.05)
    assert any("classifier" in name for name in trained)


def test_the_page_has_a_line_for_each_method() -> None:
    done = tuned(1e-3)
    others: dict[str, dict] = {}
    for run in quality.plan(done):
        if run.split == "test":
            done |= finished(run, 0.8 + 0.01 * run.seed)
            for method in ("sparse", "full"):
                others |= finished(replace(run, method=method), 0.7 + 0.01 * run.seed)
    page = quality.page(done, others)
    assert page.count("82.0 ± 1.6") == len(planning.SIZES)
    assert page.count("72.0 ± 1.6") == 2 * len(planning.SIZES)
    assert "0.001: 90.0" in page
