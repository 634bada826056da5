"""How a run finds the checkpoint from which it resumes, and how it keeps its batch size on another number of ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_zero.checkpoint import resume
from sparse_zero.checkpoint.resume import complete_resume_option, keep_batch_size, split_batch
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import Recipe


@pytest.mark.parametrize(
    ("argv", "completed"),
    [
        (["train", "r.yaml", "--resume"], ["train", "r.yaml", "--resume=auto"]),
        (["train", "--resume", "r.yaml", "a.b=1"], ["train", "--resume=auto", "r.yaml", "a.b=1"]),
        (["train", "r.yaml", "--resume", "training.seed=1"], ["train", "r.yaml", "--resume=auto", "training.seed=1"]),
        (
            ["train", "r.yaml", "--resume", "--reset", "data", "a.b=1"],
            ["train", "r.yaml", "--resume=auto", "--reset", "data", "a.b=1"],
        ),
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
def test_the_examples_per_step_stay_the_same(
    monkeypatch: pytest.MonkeyPatch, ranks: int, training: dict[str, int], expected: tuple[int, int | None]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    saved = SimpleNamespace(directory="c", manifest=SimpleNamespace(examples_per_step=24))
    changed = keep_batch_size(recipe(**training), saved).training
    assert (changed["per_device_train_batch_size"], changed.get("gradient_accumulation_steps")) == expected


def test_a_batch_that_cannot_be_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    saved = SimpleNamespace(directory="c", manifest=SimpleNamespace(examples_per_step=24))
    with pytest.raises(UserError, match="24 examples, which 5 ranks cannot share evenly"):
        keep_batch_size(recipe(), saved)


def test_without_a_checkpoint_the_run_starts_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert resume.find_resume_checkpoint(recipe(output_dir=str(tmp_path)), "auto") is None
    assert f"{tmp_path} contains no checkpoint: starting from the beginning" in capsys.readouterr().err


def test_a_run_whose_only_checkpoint_is_damaged_is_not_restarted(tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be used"):
        resume.find_resume_checkpoint(recipe(output_dir=str(tmp_path)), "auto")
    assert f"skipped: {tmp_path}/checkpoint-4: not a complete checkpoint" in capsys.readouterr().err


def test_a_named_checkpoint_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such checkpoint"):
        resume.find_resume_checkpoint(recipe(output_dir=str(tmp_path)), str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("total", "ranks", "at_most", "expected"),
    [
        (24, 4, 6, (6, 1)),
        (24, 1, 6, (6, 4)),
        (24, 2, 6, (6, 2)),
        (24, 3, 6, (4, 2)),
        (24, 8, 6, (3, 1)),
        (24, 5, 6, None),
        (7, 1, 4, (1, 7)),
    ],
)
def test_split_batch(total: int, ranks: int, at_most: int, expected: tuple[int, int] | None) -> None:
    assert split_batch(total, ranks, at_most) == expected
