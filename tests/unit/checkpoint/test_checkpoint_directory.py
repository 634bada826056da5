"""The checkpoint directory in one process: complete or absent, and errors name the damaged file."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_zero.checkpoint import manifest as manifests
from sparse_zero.checkpoint import random_states
from sparse_zero.checkpoint.directory import (
    Checkpoint,
    delete_old,
    newest_complete,
    remove_leftovers,
)
from sparse_zero.checkpoint.listing import MANIFEST_NAME, list_checkpoints
from sparse_zero.checkpoint.loader import load_partition, read_random_states
from sparse_zero.checkpoint.manifest import Manifest, ParameterRecord, Progress
from sparse_zero.checkpoint.writer import CheckpointWriter
from sparse_zero.errors import UserError
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.zero.partitions import Partition

SHARD = "shard-00000-of-00001.safetensors"


class Run:
    """Two parameters under AdamW, saved as in a run."""

    def __init__(self, output: Path, run: str = "a", keep: int | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.parameters = {"w": nn.Parameter(torch.randn(5)), "head": nn.Parameter(torch.randn(2, 3))}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)
        self.writer = CheckpointWriter(Ranks(), output, run, keep)
        self.run = run

    @property
    def partition(self) -> Partition:
        return Partition(self.parameters, self.optimizer)

    def step(self) -> None:
        sum((p**2).sum() for p in self.parameters.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, **known: Any) -> None:
        self.step()
        records = [
            ParameterRecord(name=name, shape=list(p.shape), dtype="float32", steps=self.partition.steps()[name])
            for name, p in self.parameters.items()
        ]
        manifest = Manifest(
            run=self.run,
            step=step,
            world_size=1,
            zero_stage=0,
            examples_per_step=8,
            parameters=records,
            moments=self.partition.moments(),
            optimizer="AdamW",
            learning_rates=[0.1],
            scheduler={"best": float("inf")},
            engine={},
            loss_scale=None,
            progress=Progress(last_logged_step=step),
            adapter={},
            shards=[],
            files={},
        )
        self.writer.save(manifest, self.partition, "{}\n", [], 0.5, random_states.capture(), **known)

    def load(self, directory: Path) -> None:
        load_partition(Checkpoint(directory), self.parameters, self.partition, Ranks())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    run, other = Run(tmp_path), Run(tmp_path / "other", seed=1)
    run.save(1)
    other.load(tmp_path / "checkpoint-1")
    for each in (run, other):
        each.step()
    assert all(torch.equal(run.parameters[name], other.parameters[name]) for name in run.parameters)
    assert Checkpoint(tmp_path / "checkpoint-1").manifest.scheduler == {"best": float("inf")}


def test_random_states_are_restored(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    drawn = torch.rand(3)
    random_states.restore(read_random_states(Checkpoint(tmp_path / "checkpoint-1"), 0))
    assert torch.equal(torch.rand(3), drawn)


def test_the_newest_has_the_largest_number(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for step, year in ((2, 40), (10, 30), (9, 50), (11, 20)):
        run.save(step)
        # Clocks may go backwards
        os.utime(tmp_path / f"checkpoint-{step}", (year * 3e7, year * 3e7))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    found, problems = newest_complete(tmp_path)
    assert (found.step, problems) == (11, [])


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1)
    run.save(1)
    run.writer.best = str(tmp_path / "checkpoint-1")
    for step in (2, 3):
        run.save(step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]


def test_the_only_complete_one_is_never_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    (tmp_path / "checkpoint-2" / SHARD).unlink()
    delete_old(tmp_path, keep=1, best=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def damage_manifest(directory: Path) -> None:
    text = (directory / MANIFEST_NAME).read_text()
    (directory / MANIFEST_NAME).write_text(text.replace('"step": 2', '"step": 3'))


DAMAGES = {
    "no manifest": (lambda d: (d / MANIFEST_NAME).unlink(), "not a complete checkpoint (manifest.json is missing)"),
    "no shard": (lambda d: (d / SHARD).unlink(), f"{SHARD}: missing"),
    "cut shard": (lambda d: os.truncate(d / SHARD, 500), f"{SHARD}: truncated or overwritten: it has 500 bytes"),
    "changed manifest": (damage_manifest, f"{MANIFEST_NAME}: damaged: the checksum does not match"),
    "half a manifest": (lambda d: os.truncate(d / MANIFEST_NAME, 700), f"{MANIFEST_NAME}: damaged"),
    "empty manifest": (lambda d: (d / MANIFEST_NAME).write_text("[]"), f"{MANIFEST_NAME}: damaged"),
    "another trainer state": (lambda d: (d / "trainer_state.json").write_text("[]\n"), "trainer_state.json: damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    damage(tmp_path / "checkpoint-2")
    found, (problem,) = newest_complete(tmp_path)
    assert found.step == 1
    assert str(tmp_path / "checkpoint-2") in problem
    assert message in problem


def test_a_flipped_byte_of_a_shard_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    shard = tmp_path / "checkpoint-1" / SHARD
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard}: damaged, or from another run"):
        run.load(shard.parent)


def test_a_newer_format_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.save(1)
    monkeypatch.setattr(manifests, "FORMAT_VERSION", 0)
    with pytest.raises(UserError, match="has format 1; this version of sparse-zero reads formats up to 0"):
        Checkpoint(tmp_path / "checkpoint-1")


def test_other_parameters_are_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.parameters["head"] = nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(
        UserError, match=r"'head': the checkpoint has it with shape \[2, 3\], this run has it with shape \[2, 4\]"
    ):
        run.load(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("failing", ["written", "directory"])
def test_an_interrupted_second_save_leaves_one_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A checkpoint is saved again, and the save is interrupted before the first or the second rename."""
    run = Run(tmp_path)
    run.save(1)
    old = Checkpoint(tmp_path / "checkpoint-1").manifest
    rename = Path.rename

    def cut(self: Path, target: Path) -> Path:
        if (failing == "written") == (".tmp-" in self.name):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        run.save(1)
    monkeypatch.undo()
    found, problems = newest_complete(tmp_path)
    assert (found.manifest.shards, problems) == (old.shards, [])
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert Checkpoint(tmp_path / "checkpoint-1").manifest.shards == old.shards


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2.tmp-0123abcd")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1.deleted-0123abcd")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1.replaced")
    (tmp_path / "checkpoint-mine").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-mine"]


def test_a_full_disk_keeps_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.save(1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "manifest.json")

    monkeypatch.setattr("sparse_zero.checkpoint.writer.write_manifest", full)
    with pytest.raises(UserError, match=r"checkpoint-2: not saved: rank 0: manifest\.json: No space left on device"):
        run.save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_background_save_is_visible_once_it_is_finished(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, in_background=True)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    run.step()
    assert list_checkpoints(tmp_path) == []
    assert run.writer.has_pending
    assert run.writer.finish() == tmp_path / "checkpoint-1"
    assert not run.writer.has_pending
    run.load(tmp_path / "checkpoint-1")
    assert all(torch.equal(run.parameters[name], values) for name, values in before.items())


def test_the_manifest_lists_each_file_with_size_and_checksum(tmp_path: Path) -> None:
    Run(tmp_path).save(1)
    manifest = json.loads((tmp_path / "checkpoint-1" / MANIFEST_NAME).read_text())
    files = {shard["name"]: shard["file"] for shard in manifest["shards"]} | manifest["files"]
    there = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert set(files) == there - {MANIFEST_NAME}
    for name, record in files.items():
        assert record["bytes"] == (tmp_path / "checkpoint-1" / name).stat().st_size
        assert len(record["xxh3_128"]) == 32
