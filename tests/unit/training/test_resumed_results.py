"""results.json of a run that was resumed counts the seconds and tokens of all its stretches."""

import time
from pathlib import Path

import pytest

from sparse_zero.checkpoint.manifest import read_manifest
from sparse_zero.training.training_clock import TrainingClock


@pytest.mark.parametrize("method", ["sparse", "full"])
def test_a_resumed_run_has_the_tokens_and_seconds_of_the_whole_run(recipe, train, tmp_path: Path, method: str) -> None:
    file = recipe("run", training={"method": method, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 1})
    began = time.perf_counter()
    whole = train(file)
    assert whole["train_seconds"] < time.perf_counter() - began
    last = tmp_path / "run"
    for name, step in (("second", 2), ("third", 3)):
        before = read_manifest(last / f"checkpoint-{step}").progress
        assert 0 < before.train_tokens < whole["train_tokens"]
        resumed = train(file, f"training.output_dir={tmp_path / name}", resume=str(last / f"checkpoint-{step}"))
        assert resumed["train_tokens"] == whole["train_tokens"]
        assert resumed["train_seconds"] > before.train_seconds > 0
        assert resumed["tokens_per_second"] == round(resumed["train_tokens"] / resumed["train_seconds"], 1)
        last = tmp_path / name


def test_the_clock_leaves_out_what_is_paused() -> None:
    now = [0.0]
    clock = TrainingClock(lambda: now[0])
    with clock.paused():
        now[0] = 3
    assert clock.seconds == 0
    clock.start()
    now[0] = 5
    with clock.paused():
        now[0] = 50
        assert clock.seconds == 2
    now[0] = 51
    assert clock.seconds == 3
    clock.stop()
    now[0] = 99
    with clock.paused():
        now[0] = 100
    assert clock.seconds == 3
    clock.start()
    assert clock.seconds == 0
