"""A run that resumes from an earlier checkpoint keeps and finds its own newest one. Real runs in one process."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_zero import SparseTrainer, UserError
from sparse_zero.checkpoint.directory import newest_complete
from sparse_zero.checkpoint.export import export
from sparse_zero.checkpoint.listing import list_checkpoints

BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True}


def steps(directory: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in list_checkpoints(directory)]


def values(checkpoint: Path) -> dict[str, torch.Tensor]:
    export(checkpoint, checkpoint.parent / "exported")
    return load_file(checkpoint.parent / "exported" / "adapter_model.safetensors")


def test_what_is_saved_after_going_back_is_kept_and_found(tmp_path: Path, run, caplog) -> None:
    """The attack: everything that was saved from then on was deleted at once, as it was older than checkpoint-6."""
    run(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "copy" / "checkpoint-6")
    run(tmp_path, tmp_path / "checkpoint-2", killed_at=4, save_total_limit=1, weight_decay=0.9)
    assert steps(tmp_path) == [4]
    assert steps(tmp_path / "abandoned" / "after-2") == [3, 4, 5, 6]
    assert (
        f"moved checkpoint-3, checkpoint-4, checkpoint-5, checkpoint-6 (newer than checkpoint-2) to "
        f"{tmp_path}/abandoned/after-2" in caplog.text
    )
    caplog.clear()
    resumed = run(tmp_path, True, save_total_limit=1, weight_decay=0.9)
    assert resumed._resumed.step == 4
    assert steps(tmp_path) == [6]
    assert "moved" not in caplog.text
    new, old = values(tmp_path / "checkpoint-6"), values(tmp_path / "copy" / "checkpoint-6")
    assert any(not torch.equal(new[name], old[name]) for name in old)
    left = values(tmp_path / "abandoned" / "after-2" / "checkpoint-6")
    assert all(torch.equal(left[name], old[name]) for name in old)


def test_killed_before_the_first_save_the_same_checkpoint_is_resumed(tmp_path: Path, run) -> None:
    run(tmp_path)
    run(tmp_path, tmp_path / "checkpoint-2", killed_at=2)
    assert run(tmp_path, True)._resumed.step == 2


@pytest.mark.parametrize("renames", [0, 2, 4])
def test_killed_while_moving_the_next_run_finishes_the_move(tmp_path: Path, run, monkeypatch, renames: int) -> None:
    run(tmp_path)
    rename, done = Path.rename, []

    def cut(self: Path, target: Path) -> Path:
        if "abandoned" in str(target):
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "checkpoint-2")
    monkeypatch.undo()
    resumed = run(tmp_path, True, killed_at=3)
    assert resumed._resumed.step == 2
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path / "abandoned" / "after-2") == [3, 4, 5, 6]
    assert [path.name for path in (tmp_path / "abandoned").iterdir()] == ["after-2"]


def test_a_refused_resume_moves_nothing(tmp_path: Path, run) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="AdamW"):
        run(tmp_path, tmp_path / "checkpoint-2", optim="sgd")
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_one_is_moved_too(tmp_path: Path, run) -> None:
    """Otherwise it would be in the way of the next checkpoint of this step, and be named at each resume."""
    run(tmp_path)
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    assert run(tmp_path, True)._resumed.step == 5
    assert newest_complete(tmp_path)[0].step == 6
    assert steps(tmp_path / "abandoned" / "after-5") == [6]


def test_a_run_from_another_directory_leaves_all_that_are_there(tmp_path: Path, run, caplog) -> None:
    for name in ("this", "other"):
        run(tmp_path / name, max_steps=4)
    run(tmp_path / "this", tmp_path / "other" / "checkpoint-3", save_total_limit=1)
    assert steps(tmp_path / "this") == [6]
    assert steps(tmp_path / "this" / "abandoned" / "after-0") == [1, 2, 3, 4]
    assert steps(tmp_path / "other") == [1, 2, 3, 4]
    assert "checkpoint-4 (not of this run)" in caplog.text


def test_a_run_from_the_beginning_leaves_all_that_are_there(tmp_path: Path, run) -> None:
    run(tmp_path)
    run(tmp_path, max_steps=2, save_total_limit=1)
    assert steps(tmp_path) == [2]
    assert steps(tmp_path / "abandoned" / "after-0") == [1, 2, 3, 4, 5, 6]


def test_a_branch_that_was_left_can_be_taken_up_again(tmp_path: Path, run) -> None:
    whole = run(tmp_path / "whole", max_steps=8)
    run(tmp_path / "run", max_steps=8, killed_at=6)
    run(tmp_path / "run", tmp_path / "run" / "checkpoint-2", max_steps=8, killed_at=4)
    again = run(tmp_path / "run", tmp_path / "run" / "abandoned" / "after-2" / "checkpoint-6", max_steps=8)
    assert steps(tmp_path / "run") == [7, 8]
    assert losses(again) == losses(whole)


def losses(trainer: SparseTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# The best checkpoint


def evaluations(trainer: SparseTrainer) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


def best_of(evaluations: dict[int, float]) -> int:
    return min(evaluations, key=evaluations.get)


def test_the_best_is_of_this_branch(tmp_path: Path, run) -> None:
    run(tmp_path, **BEST)
    back = run(tmp_path, tmp_path / "checkpoint-2", **BEST, save_total_limit=2, weight_decay=0.9, killed_at=5)
    best = best_of(evaluations(back))
    assert sorted(evaluations(back)) == [1, 2, 3, 4, 5]
    assert back.state.best_global_step == best
    assert Path(back.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"
    assert set(steps(tmp_path)) == {best, 5} | ({4} if best == 5 else set())


def test_a_best_one_that_is_gone_is_said_and_sought_again(tmp_path: Path, run, caplog) -> None:
    """It was deleted for a better one of the branch that was left. The run used to end with the last model."""
    first = best_of({step: loss for step, loss in evaluations(run(tmp_path, **BEST)).items() if step <= 3})
    assert first < 3
    shutil.rmtree(tmp_path / f"checkpoint-{first}")
    back = run(tmp_path, tmp_path / "checkpoint-3", **BEST)
    assert f"the best checkpoint until step 3, that of step {first}, is gone" in caplog.text
    best = best_of({step: loss for step, loss in evaluations(back).items() if step > 3})
    assert back.state.best_global_step == best
    assert Path(back.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"


def test_the_best_one_is_found_in_a_directory_that_was_moved(tmp_path: Path, run) -> None:
    cut = run(tmp_path / "old", **BEST, killed_at=4)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = run(tmp_path / "new", True, **BEST, max_steps=4)
    assert Path(moved.state.best_model_checkpoint) == tmp_path / "new" / f"checkpoint-{best_of(evaluations(cut))}"


def test_the_last_and_the_best_stay_when_training_ends(tmp_path: Path, run) -> None:
    """transformers deletes the last one then, if only one is to be kept: what is written after it could fail."""
    ended = run(tmp_path, **BEST, save_total_limit=1)
    assert steps(tmp_path) == sorted({best_of(evaluations(ended)), 6})
