"""Checkpoints that a run leaves are moved aside in one step, whatever moment the run is killed at."""

from pathlib import Path

import pytest

from sparse_zero.checkpoint import branches
from sparse_zero.checkpoint.branches import finish_leaving, leave_branch
from sparse_zero.checkpoint.listing import list_checkpoints
from sparse_zero.checkpoint.output_lock import locked
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run with checkpoint-10 to -60."""
    for step in range(10, 70, 10):
        save(tmp_path, step)
    return tmp_path


def save(output: Path, step: int) -> None:
    (output / f"checkpoint-{step}").mkdir()
    (output / f"checkpoint-{step}" / "manifest.json").write_text(str(step))


def names(directory: Path) -> list[str]:
    return [path.name for path in list_checkpoints(directory)]


LEFT = [f"checkpoint-{step}" for step in (30, 40, 50, 60)]


def test_what_is_newer_is_moved(output: Path) -> None:
    moved = leave_branch(output, 20)
    assert names(output) == ["checkpoint-10", "checkpoint-20"]
    assert names(output / "abandoned" / "after-20") == LEFT
    assert moved == {output / name: output / "abandoned" / "after-20" / name for name in LEFT}
    assert (output / "abandoned" / "after-20" / "checkpoint-60" / "manifest.json").read_text() == "60"


def test_without_newer_ones_nothing_is_written(output: Path) -> None:
    assert leave_branch(output, 60) == {}
    assert not (output / "abandoned").exists()


def test_zero_leaves_all(output: Path) -> None:
    leave_branch(output, 0)
    assert names(output) == []
    assert len(names(output / "abandoned" / "after-0")) == 6


def test_a_second_branch_from_the_same_step_gets_a_name_of_its_own(output: Path) -> None:
    for number in ("", ".2", ".3"):
        moved = leave_branch(output, 20)
        assert {path.parent.name for path in moved.values()} == {f"after-20{number}"}
        save(output, 30)
    assert names(output) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert names(output / "abandoned" / "after-20.3") == ["checkpoint-30"]


@pytest.mark.parametrize("renames", range(6))
def test_killed_at_any_moment_the_branch_is_left_or_not(
    output: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Before each of the five renames, and after the last. From the first moment on, no reader sees a half."""
    rename, done = Path.rename, []

    def cut(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", cut)
    if renames < 5:
        with pytest.raises(KeyboardInterrupt):
            leave_branch(output, 20)
    else:
        leave_branch(output, 20)
    monkeypatch.undo()
    assert names(output) == ["checkpoint-10", "checkpoint-20"]
    with locked(output, Ranks()):
        assert names(output) == ["checkpoint-10", "checkpoint-20"]
        assert [path.name for path in (output / "abandoned").iterdir()] == ["after-20"]
        assert names(output / "abandoned" / "after-20") == LEFT
        save(output, 30)
        assert names(output) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]


def test_killed_before_the_first_moment_nothing_has_changed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path, **known: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", cut)
    with pytest.raises(KeyboardInterrupt):
        leave_branch(output, 20)
    monkeypatch.undo()
    assert len(names(output)) == 6


def test_a_move_that_fails_is_one_sentence_and_can_be_finished(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "checkpoint-40":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"checkpoint-40, checkpoint-50, checkpoint-60 cannot be moved there \(Perm"):
        leave_branch(output, 20)
    monkeypatch.undo()
    assert finish_leaving(output) == output / "abandoned" / "after-20"
    assert names(output / "abandoned" / "after-20") == LEFT
    assert finish_leaving(output) is None


def test_a_file_in_the_place_of_the_directory_is_one_sentence(output: Path) -> None:
    (output / "abandoned").write_text("")
    with pytest.raises(UserError, match=r"abandoned: cannot be created .* for checkpoint-30, checkpoint-40"):
        leave_branch(output, 20)
    assert len(names(output)) == 6


def test_another_branch_finishes_the_move_of_the_first(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "finish_leaving", lambda output: None)
    with pytest.raises(TypeError):
        leave_branch(output, 40)
    monkeypatch.undo()
    assert names(output)[-1] == "checkpoint-40"
    leave_branch(output, 20)
    assert names(output / "abandoned" / "after-40") == ["checkpoint-50", "checkpoint-60"]
    assert names(output / "abandoned" / "after-20") == ["checkpoint-30", "checkpoint-40"]
