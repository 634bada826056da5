"""What a rank does at SIGTERM and SIGUSR1, and how a run finds what it goes on from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_zero.checkpoint import output_lock, resume
from sparse_zero.checkpoint.output_lock import LOCK_NAME, locked
from sparse_zero.checkpoint.resume import complete_resume_option, keep_batch_size
from sparse_zero.errors import UserError
from sparse_zero.ranks.agreement import Ranks
from sparse_zero.ranks.stop_signals import _SAME_REQUEST_SECONDS, STOPPED
from sparse_zero.recipe.recipe import Recipe

RANK = """
import os, sys, time
from sparse_zero.ranks.stop_signals import StopRequest
stop = StopRequest().listen()
if sys.argv[1] == "loading":
    print("ready", flush=True)
    time.sleep(30)
with stop.deferred():
    print("ready", flush=True)
    while not stop.is_raised:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


def rank(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", RANK, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_signal_ends_the_rank(signum: int) -> None:
    process = rank("loading")
    process.send_signal(signum)
    assert process.wait(20) == STOPPED


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_in_training_the_first_is_remembered(signum: int) -> None:
    process = rank("training", "0")
    process.send_signal(signum)
    assert process.stdout.readline() == "asked\n"
    assert process.wait(20) == 7


def test_the_second_ends_the_rank_at_once() -> None:
    process = rank("training", "30")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "asked\n"
    time.sleep(_SAME_REQUEST_SECONDS + 0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_the_same_request_may_come_twice() -> None:
    """From the scheduler, and from the launcher that passes it on."""
    process = rank("training", "1")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7


@pytest.mark.parametrize(
    ("argv", "completed"),
    [
        (["train", "r.yaml", "--resume"], ["train", "r.yaml", "--resume=auto"]),
        (["train", "--resume", "r.yaml", "a.b=1"], ["train", "--resume=auto", "r.yaml", "a.b=1"]),
        (["train", "r.yaml", "--resume", "training.seed=1"], ["train", "r.yaml", "--resume=auto", "training.seed=1"]),
        (["train", "r.yaml", "--resume", "--merge"], ["train", "r.yaml", "--resume=auto", "--merge"]),
        (["train", "r.yaml", "--resume", "auto"], ["train", "r.yaml", "--resume", "auto"]),
        (
            ["train", "r.yaml", "--resume", "runs/x/checkpoint-3"],
            ["train", "r.yaml", "--resume", "runs/x/checkpoint-3"],
        ),
    ],
)
def test_complete_resume_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], completed: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("")
    assert complete_resume_option(argv) == completed


def recipe(**training: Any) -> Recipe:
    columns = {"text": "t", "label": "l"}
    raw = {"model": {"name": "m"}, "data": {"path": "d", "columns": columns}, "training": training}
    return Recipe.model_validate(raw)


@pytest.mark.parametrize(
    ("ranks", "training", "expected"),
    [
        (4, {"per_device_train_batch_size": 6}, (6, None)),
        (2, {"per_device_train_batch_size": 6}, (6, 2)),
        (3, {"per_device_train_batch_size": 6}, (4, 2)),
        (8, {"per_device_train_batch_size": 6}, (3, 1)),
        (2, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, (6, 2)),
    ],
)
def test_a_step_keeps_its_examples(
    monkeypatch: pytest.MonkeyPatch, ranks: int, training: dict[str, int], expected: tuple[int, int | None]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    saved = SimpleNamespace(directory="c", manifest=SimpleNamespace(examples_per_step=24))
    changed = keep_batch_size(recipe(**training), saved).training
    assert (changed["per_device_train_batch_size"], changed.get("gradient_accumulation_steps")) == expected


def test_ranks_that_cannot_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    saved = SimpleNamespace(directory="c", manifest=SimpleNamespace(examples_per_step=24))
    with pytest.raises(UserError, match="24 examples, which 5 ranks cannot share evenly"):
        keep_batch_size(recipe(), saved)


def test_nothing_there_is_a_fresh_start_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert resume.find_resume_checkpoint(recipe(output_dir=str(tmp_path)), "auto") is None
    assert f"{tmp_path} contains no checkpoint: starting from the beginning" in capsys.readouterr().err


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_again(tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be used"):
        resume.find_resume_checkpoint(recipe(output_dir=str(tmp_path)), "auto")
    assert f"skipped: {tmp_path}/checkpoint-4: not a complete checkpoint" in capsys.readouterr().err


def test_a_named_one_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such checkpoint"):
        resume.find_resume_checkpoint(recipe(output_dir=str(tmp_path)), str(tmp_path / "nothing"))


HOLDER = """
import sys, time
from pathlib import Path
from sparse_zero.checkpoint.output_lock import locked
from sparse_zero.ranks.agreement import Ranks
with locked(Path(sys.argv[1]), Ranks()):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "_TIMEOUT_SECONDS", 0.5)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid} on "), hold(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()


def hold(directory: Path) -> Any:
    return locked(directory, Ranks())


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = f"training.output_dir: {tmp_path}/file/run: cannot be written to"
    with pytest.raises(UserError, match=message), hold(tmp_path / "file" / "run"):
        pass
