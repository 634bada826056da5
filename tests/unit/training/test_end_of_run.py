"""What a run writes when it ends: nothing over an earlier run's, and one sentence if the disk is full."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import rpn
from sparse_zero import UserError
from sparse_zero.checkpoint.directory import newest_complete
from sparse_zero.training import run

WORKER = Path(__file__).with_name("full_disk_worker.py")


@pytest.fixture
def end_on_full_disk(tmp_path: Path):
    """Runs full_disk_worker.py on 8 MiB of its own; returns the two runs' reports and what the first one said."""

    def end(recipe: Path, kibibytes: int, step: int = 0) -> tuple[list[dict], str]:
        disk = tmp_path / "disk"
        disk.mkdir()
        train = shlex.join([sys.executable, str(WORKER), str(recipe), str(disk), str(kibibytes), str(step)])
        script = f"mount -t tmpfs -o size=8m tmpfs {shlex.quote(str(disk))} && echo mounted && {train}"
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
        )
        if not done.stdout.startswith("mounted"):
            pytest.skip(f"a file system cannot be mounted here: {done.stderr}")
        reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"status"')]
        assert len(reports) == 2, done.stderr
        return reports, done.stderr

    return end


@pytest.mark.parametrize(
    ("kibibytes", "unwritten"), [(0, "adapter/adapter_model.safetensors"), (60, "merged/model.safetensors")]
)
def test_a_full_disk_is_one_sentence_and_the_run_can_be_ended(
    recipe, end_on_full_disk, kibibytes: int, unwritten: str
) -> None:
    file = recipe("run", training={"report_to": "tensorboard"})
    (full, ended), said = end_on_full_disk(file, kibibytes)
    assert full["status"] == 2
    assert "Traceback" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("sparse-zero: error: ")]
    assert "cannot be written (No space left on device): the training is done" in sentence
    assert "make room, and resume with --resume, from checkpoint-4, to write it" in sentence
    assert full["files"].keys() >= {"checkpoint-4/manifest.json", "checkpoint-4/trainer_state.json"}
    assert full["files"].get(unwritten, 0) != ended["files"][unwritten]
    assert ended["status"] == 0
    assert ended["files"].keys() >= {"adapter/adapter_config.json", "results.json"}
    assert not [name for name in ended["files"] if name.endswith(".tmp")]


def test_a_disk_that_is_full_in_training_is_said_and_training_goes_on(recipe, end_on_full_disk) -> None:
    """Nor do the curves end the run: TensorBoard's writer raises an error at any later call."""
    file = recipe("run", training={"report_to": "tensorboard", "max_steps": 6})
    (full, ended), said = end_on_full_disk(file, 0, step=2)
    assert "Traceback" not in said
    assert "checkpoint-3: not saved: rank 0: " in said
    assert "step 6/6  training" in said
    assert (full["status"], ended["status"]) == (2, 0)
    assert "resume with --resume, from checkpoint-2, to write it" in said
    assert ended["files"].keys() >= {"checkpoint-6/manifest.json", "adapter/adapter_config.json", "results.json"}


def test_the_results_of_a_run_that_diverged_are_json(recipe, train, tmp_path: Path) -> None:
    """Which has no NaN; strict parsers, such as those of browsers, refuse the whole file."""
    results = train(recipe("run", training={"learning_rate": 1e30, "save_strategy": "no"}))
    assert math.isnan(results["loss"])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=refuse)
    assert written.keys() == results.keys()
    assert written["loss"] is None
    assert written["train_seconds"] == results["train_seconds"]


def test_results_on_a_full_disk(recipe, train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The table is printed all the same. /dev/full has never any room."""
    file = recipe("run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"results\.json.*: cannot be written \(No space left on device\): the trai"):
        train(file)
    assert "perplexity" in capsys.readouterr().out
    assert newest_complete(tmp_path / "run")[0].step == 4
    assert train(file, resume="auto")["steps"] == 4
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


def digests(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [None, "auto"])
def test_an_older_adapter_is_not_overwritten(recipe, train, tmp_path: Path, resume: str | None) -> None:
    """../shared/field 17: a second run into the directory of a finished one used to replace adapter/ and merged/."""
    file = recipe("run", training={"save_strategy": "no", "max_steps": 1})
    train(file, merge=True)
    output = tmp_path / "run"
    before = {name: digests(output / name) for name in ("adapter", "merged")}
    assert all(before.values())
    for name in ("adapter", "merged", "results.json"):
        with pytest.raises(UserError, match=rf"run contains {name} of an earlier run, .* or remove .*/run/{name}$"):
            train(file, "training.max_steps=2", merge=True, resume=resume)
        if name in before:
            assert digests(output / name) == before[name]
            (output / name).rename(tmp_path / name)
    (output / "results.json").unlink()
    assert train(file, "training.max_steps=2", resume=resume)["steps"] == 2


def test_a_resumed_run_replaces_its_own_adapter(recipe, train, tmp_path: Path) -> None:
    file = recipe("run")
    train(file)
    before = digests(tmp_path / "run" / "adapter")
    assert train(file, "training.max_steps=6", resume="auto")["steps"] == 6
    assert digests(tmp_path / "run" / "adapter") != before


def test_a_run_that_resumes_from_another_one_does_not_overwrite(recipe, train, tmp_path: Path) -> None:
    for name in ("one", "other"):
        train(recipe(name))
    with pytest.raises(UserError, match=r"one contains adapter of an earlier run"):
        train(tmp_path / "one.yaml", resume=str(tmp_path / "other" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changes", "ranks", "is_said"),
    [
        ({}, 2, True),
        ({}, 4, False),
        ({"scope": "sequence"}, 2, False),
        ({"noise": "gaussian"}, 2, True),
        ({"noise": "none"}, 2, False),
        ({"passes": 0}, 2, False),
    ],
)
def test_noise_that_another_number_of_ranks_changes_is_said(changes, ranks, is_said, capsys) -> None:
    saved_on_four = SimpleNamespace(manifest=SimpleNamespace(world_size=4))
    run._say_if_noise_changes(rpn.RPNConfig(**changes), saved_on_four, ranks)
    said = "sparse-zero: the noise is not what it would have been on 4 ranks: with rpn.scope: batch it depends on the"
    assert capsys.readouterr().err.startswith(said) == is_said


def test_without_noise_nothing_is_said_of_it(capsys) -> None:
    run._say_if_noise_changes(None, SimpleNamespace(manifest=SimpleNamespace(world_size=4)), 2)
    run._say_if_noise_changes(rpn.RPNConfig(), None, 2)
    assert capsys.readouterr().err == ""
