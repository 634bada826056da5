"""Checkpoints on several ranks: exact on as many, the same losses on any number and at any ZeRO stage."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
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
    for number, count in enumerate((1, 2, 3, 8))
    for target, source in (
        ("zero1", ("zero2", "zero3", "ddp")[number % 3]),
        ("zero2", ("zero3", "zero1", "zero0")[number % 3]),
        ("zero3", ("zero1", "zero2", "ddp")[number % 3]),
    )
] + [("zero3", 2, "ddp"), ("zero1", 3, "zero2-offload"), ("zero2-offload", 2, "zero3-offload")]
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
CUTS = (2, 3, 5)


def job(out: Path, base: Path, config: str, count: int, resume: Path | None = None, **more: Any) -> dict[str, Any]:
    training = {"deepspeed": CONFIGS[config], "max_steps": STEPS, "save_steps": SAVED} | more.pop("training", {})
    out.mkdir(parents=True, exist_ok=True)
    case = {"base": str(base), "task": TASK, "out": str(out), "resume": str(resume) if resume else None} | more
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
    assert names == {"manifest.json", "trainer_state.json"} | {f"shard-0000{r}-of-00004.safetensors" for r in range(4)}


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
        for step in CUTS:
            checkpoint = out / name / f"checkpoint-{step}"
            jobs[name].append(job(out / f"{name}-{step}", bases[TASK], settings["config"], 2, checkpoint, **common))
    return out, fork_server.run(jobs, out)


@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit_on_the_same_ranks(exact: tuple[Path, dict], name: str) -> None:
    out, ends = exact
    assert [end["statuses"] for end in ends[name]] == [[0, 0]] * (1 + len(CUTS)), ends[name]
    assert all(math.isfinite(loss) for _, loss in losses(out / name))
    for step in CUTS:
        assert losses(out / f"{name}-{step}") == losses(out / name)
        for file in ("adapter/adapter_model", "held-0", "held-1"):
            whole, rest = (load_file(out / run / f"{file}.safetensors") for run in (name, f"{name}-{step}"))
            assert rest.keys() == whole.keys()
            assert all(torch.equal(rest[key], values) for key, values in whole.items()), (step, file)
