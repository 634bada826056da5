"""Runs that are killed, told to stop, or find no room: nothing is lost beyond the last save, and nothing hangs."""

import fcntl
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import ForkServer
from recipes import write_recipe
from safetensors.torch import load_file
from test_checkpoints import SAVED, job
from test_checkpoints import STEPS as JOB_STEPS
from trainer_cases import zero_config

from sparse_zero.checkpoint.directory import newest_complete
from sparse_zero.checkpoint.output_lock import LOCK_NAME
from sparse_zero.ranks.stop_signals import STOPPED

pytestmark = pytest.mark.distributed

TASK, RANKS, SAVE_STEPS, STEPS = "sequence-classification", 2, 2, 120
ENDING_SECONDS = 60

POINTS = {
    "load": 4,
    "forward": 12,
    "backward": 12,
    "step": 6,
    "after-step": 6,
    "evaluate": 3,
    "save": 3,
    "write:shard": 3,
    "write:trainer_state": 3,
    "write:manifest": 3,
    "complete": 3,
    "publish": 3,
    "rename": 3,
    "delete": 3,
}
"""Where ranks are killed, and the last of its calls in a launch at which that is tried."""
OF_RANK_0 = {"write:trainer_state", "write:manifest", "complete", "publish", "rename", "delete"}


def planned_kills() -> list[dict[str, Any]]:
    rng = random.Random(0)
    kills = []
    for action in ("kill", "kill-all"):
        for point, last in POINTS.items():
            rank = 0 if point in OF_RANK_0 else rng.randrange(RANKS)
            kills.append({"point": point, "rank": rank, "number": rng.randint(1, last), "action": action})
    return sorted(kills, key=lambda _: rng.random())


KILLS = planned_kills()


def recipe(directory: Path, base: Path, data: Path, config: int = 2, **training: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "zero.json").write_text(json.dumps(zero_config(config)))
    known = {"deepspeed": "zero.json", "save_strategy": "steps", "save_steps": SAVE_STEPS, "logging_steps": 1}
    known |= {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": False, "disable_tqdm": True}
    known |= {"max_steps": STEPS, "save_total_limit": 2, "warmup_steps": 4}
    return write_recipe(
        directory / "run.yaml",
        base,
        TASK,
        data,
        sparse={"density": 0.02, "dropout": 0.1},
        rpn={"probability": 0.2, "passes": 1},
        training=known | training,
    )


def launch(
    recipe: Path, fault: dict[str, Any] | None = None, *options: str, ledger: str | None = None
) -> dict[str, Any]:
    return {"count": RANKS, "call": "fault_worker:run", "arguments": [[str(recipe), *options], fault, ledger]}


def losses(directory: Path) -> list[tuple[int, float]]:
    found, _ = newest_complete(directory / "run")
    state = json.loads((found.directory / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "run" / "adapter" / "adapter_model.safetensors")


def assert_same(resumed: Path, whole: Path) -> None:
    assert losses(resumed) == losses(whole)
    expected = adapter(whole)
    found = adapter(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


STOPS: dict[str, tuple[dict[str, Any], int | None]] = {
    "before-training": ({"point": "data", "rank": 0, "number": 1, "action": "ask"}, None),
    "in-warm-up": ({"point": "forward", "rank": 1, "number": 1, "action": "warn"}, 1),
    "in-a-step": ({"point": "backward", "rank": 1, "number": 9, "action": "ask"}, 5),
    "in-an-evaluation": ({"point": "evaluate", "rank": 1, "number": 4, "action": "ask"}, 6),
    "in-a-save": ({"point": "write:shard", "rank": 0, "number": 2, "action": "warn"}, 5),
    "in-the-last-evaluation": ({"point": "evaluate", "rank": 0, "number": 7, "action": "ask"}, 8),
}
"""What signal comes when, and the step at which all is saved then: of 8, with an evaluation after each third."""
SHORT = {"max_steps": 8, "per_device_eval_batch_size": 5}


@pytest.fixture(scope="module")
def runs(
    fork_server: ForkServer, bases: dict, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list]]:
    """All launches of this file but those of `refused`."""
    out = tmp_path_factory.mktemp("faults")
    base = bases[TASK]
    jobs = {"whole": [launch(recipe(out / "whole", base, data))]}
    killed = recipe(out / "killed", base, data)
    jobs["killed"] = [
        launch(killed, fault, "--resume", "auto", ledger=str(out / "killed" / f"ledger-{number}"))
        for number, fault in enumerate(KILLS)
    ]
    jobs["killed"].append(launch(killed, None, "--resume"))
    jobs["short"] = [launch(recipe(out / "short", base, data, **SHORT))]
    for name, (fault, _) in STOPS.items():
        stopped = recipe(out / name, base, data, **SHORT)
        jobs[name] = [launch(stopped, fault), launch(stopped, None, "--resume")]
    insisted = recipe(out / "insisted", base, data, **SHORT)
    fault = {"point": "write:shard", "rank": 1, "number": 2, "action": "insist"}
    jobs["insisted"] = [launch(insisted, fault), launch(insisted, None, "--resume")]
    for name in ("straight", "moved"):
        file = recipe(out / name, base, data, max_steps=10)
        sections = yaml.safe_load(file.read_text())
        sections["data"]["train_size"] = 56  # whole steps, on any number of ranks
        del sections["rpn"], sections["sparse"]["dropout"]
        file.write_text(yaml.safe_dump(sections))
        jobs[name] = [launch(file)]
    jobs["moved"] = [launch(file, {"point": "step", "rank": 1, "number": 5, "action": "ask"})]
    jobs["moved"].append(launch(file, None, "--resume") | {"count": 1})
    full = recipe(out / "full", base, data, **SHORT)
    jobs["full-at-a-stop"] = [launch(full, {"point": "step", "rank": 1, "number": 5, "action": "ask-when-full"})]
    jobs["full-at-a-stop"].append(launch(full, None, "--resume"))
    for name in FULL:
        training = {"async_save": name == "in-background", "per_device_train_batch_size": 4}
        jobs[name] = [job(out / name, base, "zero2", RANKS, training=training, full_on_rank=1)]
    return out, fork_server.run(jobs, out)


@pytest.mark.parametrize("number", range(len(KILLS)))
def test_a_kill_ends_all_ranks(runs: tuple[Path, dict], number: int) -> None:
    end, kill = runs[1]["killed"][number], KILLS[number]
    assert "hanging" not in end, end
    assert end["statuses"][kill["rank"]] == -9, (kill, end)
    assert all(status != 0 for status in end["statuses"]), (kill, end)
    assert end["ending_seconds"] < ENDING_SECONDS


def test_nothing_is_lost_but_the_steps_since_the_last_save(runs: tuple[Path, dict]) -> None:
    out, ends = runs
    saved = 0
    for number, end in enumerate(ends["killed"]):
        # A rank that is killed while the other one loads may not have said yet from where it resumes.
        if resumed := re.search(r"resuming from \S+ \(step (\d+)", end["log"]):
            # A save may have become visible just before the kill that kept it from the ledger.
            assert 0 <= int(resumed[1]) - saved <= SAVE_STEPS, (KILLS[number - 1], saved)
            saved = int(resumed[1])
        ledger = out / "killed" / f"ledger-{number}"
        saved = max([saved, *map(int, ledger.read_text().split() if ledger.exists() else ())])
    assert saved > 10


def test_after_all_kills_the_run_ends_as_if_never_killed(runs: tuple[Path, dict]) -> None:
    out, ends = runs
    assert ends["killed"][-1]["statuses"] == ends["whole"][0]["statuses"] == [0, 0], ends["killed"][-1]
    assert_same(out / "killed", out / "whole")
    assert len(losses(out / "whole")) == STEPS


def test_no_half_a_checkpoint_is_left(runs: tuple[Path, dict]) -> None:
    names = sorted(path.name for path in (runs[0] / "killed" / "run").iterdir())
    checkpoints = [f"checkpoint-{STEPS - SAVE_STEPS}", f"checkpoint-{STEPS}"]
    assert names == [LOCK_NAME, "adapter", *checkpoints, "logs", "results.json"]


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_saves_and_the_run_goes_on(runs: tuple[Path, dict], name: str) -> None:
    out, ends = runs
    (fault, step), (stopped, resumed) = STOPS[name], ends[name]
    assert stopped["statuses"][fault["rank"]] == STOPPED, stopped
    if step is not None:
        assert stopped["statuses"] == [STOPPED] * RANKS, stopped
        saved = out / name / "run" / f"checkpoint-{step}"
        assert f"sparse-zero: stopped at step {step}: saved {saved}; resume with --resume" in stopped["log"]
        assert f"checkpoint-{step} (step {step}, saved on 2 ranks)" in resumed["log"]
    assert resumed["statuses"] == [0, 0], resumed
    assert_same(out / name, out / "short")


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(runs: tuple[Path, dict]) -> None:
    out, ends = runs
    stopped, resumed = ends["insisted"]
    assert stopped["statuses"][1] == 128 + 15, stopped
    assert stopped["ending_seconds"] < ENDING_SECONDS
    assert "checkpoint-2 (step 2, saved on 2 ranks)" in resumed["log"]
    assert_same(out / "insisted", out / "short")


def test_fewer_ranks_go_on_with_the_same_steps(runs: tuple[Path, dict]) -> None:
    out, ends = runs
    stopped, resumed = ends["moved"]
    assert (stopped["statuses"], resumed["statuses"]) == ([STOPPED] * RANKS, [0]), ends["moved"]
    assert "keeping 8 examples per step: 4 x 2 micro-batches on each of 1 ranks" in resumed["log"]
    assert losses(out / "moved") == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in losses(out / "straight")]


FULL = ("in-the-foreground", "in-background")


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(runs: tuple[Path, dict], name: str) -> None:
    out, ends = runs
    (end,) = ends[name]
    assert end["statuses"] == [0, 0], end
    lost = out / name / f"checkpoint-{SAVED}"
    shard = f"{lost.name}.tmp-\\w+/shard-00001-of-00002.safetensors"
    said = re.findall(rf"{lost}: not saved: rank 1: \S+/{shard}: File too large; training continues", end["log"])
    assert len(said) == 1
    assert [path.name for path in (out / name).glob("checkpoint-*")] == [f"checkpoint-{JOB_STEPS}"]


def test_a_stop_without_room_is_an_error_and_the_last_checkpoint_is_whole(runs: tuple[Path, dict]) -> None:
    out, ends = runs
    stopped, resumed = ends["full-at-a-stop"]
    assert stopped["statuses"] == [2, 2], stopped
    assert f"sparse-zero: error: {out}/full/run/checkpoint-5: not saved: rank 1: " in stopped["log"]
    assert f"resuming from {out}/full/run/checkpoint-4 " in resumed["log"]
    assert_same(out / "full", out / "short")


@pytest.fixture(scope="module")
def refused(fork_server: ForkServer, runs: tuple[Path, dict], bases: dict, data: Path) -> tuple[Path, dict[str, list]]:
    """Launches on damaged copies of a run, on a directory in use, on one that cannot be written to."""
    out, jobs = runs[0] / "refused", {}
    base = bases[TASK]

    def copy(name: str, **training: Any) -> tuple[Path, Path]:
        file = recipe(out / name, base, data, **SHORT | training)
        shutil.copytree(runs[0] / "short" / "run", out / name / "run")
        return file, out / name / "run" / "checkpoint-8"

    shard = "shard-00001-of-00002.safetensors"
    file, checkpoint = copy("flipped")
    content = bytearray((checkpoint / shard).read_bytes())
    content[len(content) // 3] ^= 1
    (checkpoint / shard).write_bytes(content)
    jobs["flipped"] = [launch(file, None, "--resume")]
    file, checkpoint = copy("other-run")
    shutil.copy(runs[0] / "in-a-step" / "run" / "checkpoint-8" / shard, checkpoint / shard)
    jobs["other-run"] = [launch(file, None, "--resume", str(checkpoint))]
    file, checkpoint = copy("missing")
    (checkpoint / shard).unlink()
    jobs["missing"] = [launch(file, None, "--resume", str(checkpoint))]
    file, checkpoint = copy("cut-short")
    (checkpoint / shard).write_bytes(bytes(content[:-10]))
    jobs["cut-short"] = [launch(file, None, "--resume", "auto")]
    file, _ = copy("not-resumed")
    jobs["not-resumed"] = [launch(file)]
    file, _ = copy("in-use")
    jobs["in-use"] = [launch(file, None, "--resume")]
    file, _ = copy("unwritable", output_dir="/proc/run")
    jobs["unwritable"] = [launch(file)]
    with (out / "in-use" / "run" / LOCK_NAME).open("w") as lock:
        lock.write(json.dumps({"host": "elsewhere", "process": 17, "job": None}))
        lock.flush()
        fcntl.lockf(lock, fcntl.LOCK_EX)
        return out, fork_server.run(jobs, out)


REFUSALS = {
    "flipped": "{run}/checkpoint-8/shard-00001-of-00002.safetensors: damaged, or from another run: the digest of "
    "bytes 0 to",
    "other-run": "{run}/checkpoint-8/shard-00001-of-00002.safetensors: ",
    "missing": "{run}/checkpoint-8/shard-00001-of-00002.safetensors: missing",
    "not-resumed": "training.output_dir: {run} contains checkpoint-8 of an earlier run: resume it with --resume",
    "in-use": "training.output_dir: {run} is in use by process 17 on elsewhere",
    "unwritable": "training.output_dir: /proc/run/logs/rank-00000.log: cannot be written to (No such file",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_refuses_and_one_says_why(refused: tuple[Path, dict], name: str) -> None:
    out, ends = refused
    (end,) = ends[name]
    assert end["statuses"] == [2, 2], end
    assert end["log"].count("sparse-zero: error: ") == 1
    assert f"sparse-zero: error: {REFUSALS[name].format(run=out / name / 'run')}" in end["log"]
    assert end["ending_seconds"] < ENDING_SECONDS


def test_the_newest_complete_one_is_resumed_from(refused: tuple[Path, dict], runs: tuple[Path, dict]) -> None:
    out, ends = refused
    (end,) = ends["cut-short"]
    assert end["statuses"] == [0, 0], end
    assert f"skipped: {out}/cut-short/run/checkpoint-8/shard-00001-of-00002.safetensors: truncated" in end["log"]
    assert f"resuming from {out}/cut-short/run/checkpoint-6 " in end["log"]
    assert_same(out / "cut-short", runs[0] / "short")
