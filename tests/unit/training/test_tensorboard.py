"""The TensorBoard curves of a run, also after a resume."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_zero.training.tensorboard import ResumableTensorBoardCallback, log_directory


def curves(directory: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(directory)).Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in ("train/loss", "eval/loss")}


def test_a_resumed_run_continues_its_curves(trainer: Any, tmp_path: Path) -> None:
    trainer(tmp_path).train()
    (directory,) = (tmp_path / "runs").iterdir()
    assert curves(directory) == {"train/loss": [2, 4, 6, 8], "eval/loss": [0, 4, 8]}
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert list((tmp_path / "runs").iterdir()) == [directory]
    assert len(list(directory.iterdir())) == 2
    assert curves(directory) == {"train/loss": [2, 4, 6, 8], "eval/loss": [0, 4, 8]}
    again.evaluate()
    assert list((tmp_path / "runs").iterdir()) == [directory]


def test_a_new_run_has_new_curves(trainer: Any, tmp_path: Path) -> None:
    for _ in range(2):
        trainer(tmp_path, save_strategy="no").train()
    directories = sorted((tmp_path / "runs").iterdir())
    assert [curves(directory)["train/loss"] for directory in directories] == [[2, 4, 6, 8]] * 2


def test_an_earlier_evaluation_is_not_in_the_curves_of_the_run(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = trainer(tmp_path / "out")
    one.evaluate()
    (writer,) = [
        each.tb_writer for each in one.callback_handler.callbacks if isinstance(each, ResumableTensorBoardCallback)
    ]
    one.train()
    assert writer.all_writers is None  # closed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    first, last = sorted((tmp_path / "out" / "runs").iterdir())
    assert last.name == "evaluation"
    assert curves(first)["train/loss"] == [2, 4, 6, 8]


def test_the_directory_in_the_environment(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    trainer(tmp_path / "out", save_strategy="no").train()
    assert curves(tmp_path / "mine")["train/loss"] == [2, 4, 6, 8]
    assert not (tmp_path / "out" / "runs").exists()


def test_log_directory(tmp_path: Path) -> None:
    first = log_directory(tmp_path, "0a1b")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_0a1b", first.name)
    (tmp_path / "1999-01-01_00-00-00_0a1b").mkdir()
    assert log_directory(tmp_path, "0a1b").name == "1999-01-01_00-00-00_0a1b"
    assert log_directory(tmp_path, "0a1c").name.endswith("_0a1c")
