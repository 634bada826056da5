"""Checkpoints on several ranks: exact on as many, the same losses on any number and at any ZeRO stage."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_worker import QUIET
from ranks import ForkServer
from safetensors.torch import load_file
from trainer_cases import zero_config

from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.export import export

pytestmark = pytest.mark.distributed

TASK = "sequence-classification"
SAVED, STEPS, TOTAL = 4, 8, 24
"""Three steps an epoch: the checkpoint is in the middle of the second."""

SMALL_BUCKETS = {"stage3_param_persistence_threshold": 100}
"""So that at stage 3 some trained parameters are kept whole on every rank, and some are not."""

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CONFIGS: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "zero0": zero_config(0),
    "zero1": zero_config(1),
    "zero2": zero_config(2),
    "zero3": zero_config(3, **SMALL_BUCKETS),
    "zero2-offload": zero_config(2, **OFFLOAD),
    "zero3-offload": zero_config(3, **SMALL_BUCKETS, **OFFLOAD, offload_param={"device": "cpu"}),
}
PAIRS = [
    (source, count, target)
    for number, count in enumerate((1, 2, 3))
    for target, source in (
        ("zero1", ("zero2", "zero3", "ddp")[number % 3]),
        ("zero2", ("zero3", "zero1", "zero0")[number % 3]),
        ("zero3", ("zero1", "zero2", "ddp")[number % 3]),
    )
] + [("zero1", 8, "zero3"), ("zero3", 2, "ddp"), ("zero1", 3, "zero2-offload"), ("zero2-offload", 2, "zero3-offload")]
SOURCES = sorted({source for source, *_ in PAIRS})

EXACT: dict[str, dict[str, Any]] = {
    "ddp": {"config": "ddp"},
    "zero2": {"config": "zero2", "training": {"gradient_accumulation_steps": 2}},
    "zero3": {"config": "zero3", "training": {"async_save": True}},
    "zero2-offload": {"config": "zero2-offload"},
    "zero0-bfloat16": {"config": "zero0", "training": {"bf16": True}},
    "zero1-bfloat16": {"config": "zero1", "training": {"bf16": True}},
    "zero2-bfloat16": {"config": "zero2", "training": {"bf16": True, "train_sampling_strategy": "group_by_length"}},
    "zero3-bfloat16": {"config": "zero3", "training": {"bf16": True}},
}
CUTS = {name: (2, 3, 5) if name in ("ddp", "zero2", "zero2-bfloat16") else (5,) for name in EXACT}
"""Steps after which a run goes on from its checkpoint: of the runs that differ in their data (plain, accumulated,
grouped by length) at several places of an epoch, of the others, which differ in what ranks store, at one.
"""


def job(
    out: Path, base: Path, config: str, count: int, resume: Path | bool | None = None, **more: Any
) -> dict[str, Any]:
    training = {"deepspeed": CONFIGS[config], "max_steps": STEPS, "save_steps": SAVED} | more.pop("training", {})
    out.mkdir(parents=True, exist_ok=True)
    resume = str(resume) if isinstance(resume, Path) else resume
    case = {"base": str(base), "task": TASK, "out": str(out), "resume": resume} | more
    return {"count": count, "call": "checkpoint_worker:train", "arguments": [case | {"training": training}]}


def losses(out: Path) -> list[tuple[int, float]]:
    return [tuple(entry) for entry in json.loads((out / "rank-0.json").read_text())["losses"]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def resharded(fork_server: ForkServer, bases: dict[str, Path], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs on 4 ranks, and what goes on from their checkpoints on other numbers of ranks, at other stages."""
    sources, resumed = {}, {}
    for source in SOURCES:
        sized = {"per_device_train_batch_size": TOTAL // 4}
        sources[source] = [job(out / source, bases[TASK], source, 4, training=sized)]
    for source, count, target in PAIRS:
        name = f"{source}-{count}-{target}"
        sized = {"per_device_train_batch_size": TOTAL // count}
        checkpoint = out / source / f"checkpoint-{SAVED}"
        resumed[name] = [job(out / name, bases[TASK], target, count, checkpoint, training=sized)]
    # The checkpoints of the first request are read in the second
    return fork_server.run(sources, out) | fork_server.run(resumed, out)


@pytest.mark.parametrize(("source", "count", "target"), PAIRS)
def test_the_same_losses_on_any_ranks_at_any_stage(
    resharded: dict, out: Path, source: str, count: int, target: str
) -> None:
    name = f"{source}-{count}-{target}"
    assert [end["statuses"] for end in resharded[name]] == [[0] * count], resharded[name]
    whole, rest = losses(out / source), losses(out / name)
    assert [step for step, _ in rest] == list(range(1, STEPS + 1))
    assert rest == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in whole]
    torch.testing.assert_close(adapter(out / name), adapter(out / source), rtol=0, atol=2e-5)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("source", SOURCES)
def test_each_rank_writes_its_share_and_nothing_else(resharded: dict, out: Path, source: str) -> None:
    checkpoint = Checkpoint(out / source / f"checkpoint-{SAVED}")
    sizes = checkpoint.manifest.sizes()
    held = [sum(end - start for start, end in shard.spans) for shard in checkpoint.manifest.shards]
    assert sum(held) == sum(sizes.values())
    # DeepSpeed pads: at stage 3 each parameter is cut into equal slices, elsewhere a whole group is
    assert all(abs(count - sum(held) / 4) <= 4 * len(sizes) for count in held)
    names = {path.name for path in checkpoint.directory.iterdir()}
    shards = {f"shard-0000{r}-of-00004.safetensors" for r in range(4)}
    assert names == {"manifest.json", "trainer_state.json", "settings.json"} | shards


@pytest.mark.parametrize("source", SOURCES)
def test_the_exported_adapter_is_the_one_that_was_saved(resharded: dict, out: Path, source: str) -> None:
    export(out / source / f"checkpoint-{STEPS}", out / source / "exported")
    exported = load_file(out / source / "exported" / "adapter_model.safetensors")
    torch.testing.assert_close(exported, adapter(out / source), rtol=0, atol=0)


@pytest.fixture(scope="module")
def exact(
    fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Two ranks with noise and dropout of deltas, cut at several steps."""
    out = tmp_path_factory.mktemp("exact")
    jobs = {}
    for name, settings in EXACT.items():
        training = {"per_device_train_batch_size": 4, "save_steps": 1} | settings.get("training", {})
        common = {"noise": True, "dropout": 0.1, "examples": 30, "training": training}
        jobs[name] = [job(out / name, bases[TASK], settings["config"], 2, **common)]
        for step in CUTS[name]:
            checkpoint = out / name / f"checkpoint-{step}"
            jobs[name].append(job(out / f"{name}-{step}", bases[TASK], settings["config"], 2, checkpoint, **common))
    return out, fork_server.run(jobs, out)


@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit_on_the_same_ranks(exact: tuple[Path, dict], name: str) -> None:
    out, ends = exact
    assert [end["statuses"] for end in ends[name]] == [[0, 0]] * (1 + len(CUTS[name])), ends[name]
    assert all(math.isfinite(loss) for _, loss in losses(out / name))
    for step in CUTS[name]:
        assert losses(out / f"{name}-{step}") == losses(out / name)
        for file in ("adapter/adapter_model", "held-0", "held-1"):
            whole, rest = (load_file(out / run / f"{file}.safetensors") for run in (name, f"{name}-{step}"))
            assert rest.keys() == whole.keys()
            assert all(torch.equal(rest[key], values) for key, values in whole.items()), (step, file)


BRANCHES = ("ddp", "zero2", "zero3")
RESETS: dict[str, dict[str, Any]] = {
    "kept": {},
    "rate": {"reset": ["learning_rate"]},
    "moments": {"reset": ["optimizer"], "rate": QUIET["learning_rate"]},
}
"""What is reset when a run of two ranks goes back to step 2, with another learning rate than the checkpoint's."""


@pytest.fixture(scope="module")
def branched(
    fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Runs of two ranks that go back to step 2 of their own directory, then resume from its newest checkpoint.

    The directories are copies of one run's for each configuration.
    """
    out = tmp_path_factory.mktemp("branched")
    sized = {"per_device_train_batch_size": 4, "save_steps": 1, "max_steps": 5, "lr_scheduler_type": "constant"}
    first = {config: [job(out / config, bases[TASK], config, 2, training=sized)] for config in BRANCHES}
    jobs, ends = {}, fork_server.run(first, out)
    for config in BRANCHES:
        for name, settings in RESETS.items():
            here, reset = out / f"{config}-{name}", settings.get("reset", ())
            shutil.copytree(out / config, here)
            back = sized | {"learning_rate": settings.get("rate", 1e-3), "save_total_limit": 1, "max_steps": 4}
            jobs[here.name] = [
                job(here, bases[TASK], config, 2, here / "checkpoint-2", training=back, reset=reset),
                job(here, bases[TASK], config, 2, True, training=back | {"max_steps": 6}),
            ]
    return out, ends | fork_server.run(jobs, out)


@pytest.mark.parametrize("name", RESETS)
@pytest.mark.parametrize("config", BRANCHES)
def test_what_ranks_save_after_going_back_is_kept_and_found(branched: tuple, config: str, name: str) -> None:
    out, ends = branched[0] / f"{config}-{name}", branched[1][config] + branched[1][f"{config}-{name}"]
    assert [end["statuses"] for end in ends] == [[0, 0]] * 3, ends
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6"]
    left = sorted(path.name for path in (out / "abandoned" / "after-2").iterdir())
    assert left == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    logged = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    rate = 1e-3 if name == "rate" else QUIET["learning_rate"]
    rates = [entry["learning_rate"] for entry in logged if "learning_rate" in entry]
    assert rates == pytest.approx([QUIET["learning_rate"]] * 2 + [rate] * 4)
    steps = {parameter.steps for parameter in Checkpoint(out / "checkpoint-6").manifest.parameters}
    assert steps == {4 if name == "moments" else 6}


def test_a_reset_is_the_same_at_every_stage(branched: tuple) -> None:
    """And it matters."""
    losses_of = {
        (config, name): [loss for _, loss in losses(branched[0] / f"{config}-{name}")]
        for config in BRANCHES
        for name in RESETS
    }
    for name in RESETS:
        for config in BRANCHES:
            assert losses_of[config, name] == pytest.approx(losses_of["ddp", name], abs=1e-5)
    assert len({tuple(losses_of["ddp", name][:4]) for name in RESETS}) == 3
