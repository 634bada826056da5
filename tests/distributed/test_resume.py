"""Checkpoints of the Trainer on two ranks: what they hold, and the best of them. test_checkpoints.py resumes them."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import ForkServer
from safetensors.torch import load_file
from trainer_cases import case, run_cases, zero_config

from sparse_zero.checkpoint.export import export

pytestmark = pytest.mark.distributed

TASK, RANKS, STEPS, SAVED = "causal-lm", 2, 10, 6
TRAINING = {
    "max_steps": STEPS,  # two epochs of five steps
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "random",
    "learning_rate": 3e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": SAVED,
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": zero_config(2)},
    "zero3": {"deepspeed": zero_config(3, stage3_param_persistence_threshold=0)},
    "zero2-bfloat16": {"deepspeed": zero_config(2), "bf16": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embeddings are far larger than everything that trains."""
    directory = tmp_path_factory.mktemp("base")
    tiny.save_llama(directory, vocabulary=5_000)
    return directory


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ranks(fork_server: ForkServer, base: Path, out: Path) -> list[dict[str, Any]]:
    """What each rank sees of whole runs that save a checkpoint on their way, and of runs that end with the best
    model's adapter, where best is the greatest loss."""
    cases = [case(way, TASK, base, 40, **TRAINING, **settings) for way, settings in WAYS.items()]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    often = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    cases += [case(f"{way}-best", TASK, base, 40, **TRAINING | WAYS[way] | best | often) for way in ("zero2", "zero3")]
    return run_cases(fork_server, RANKS, cases, out)


def checkpoint(out: Path, way: str, step: int = SAVED) -> Path:
    return out / way / f"checkpoint-{step}"


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_holds_no_frozen_weights(base: Path, ranks: list, out: Path, way: str) -> None:
    size = sum(file.stat().st_size for file in checkpoint(out, way).rglob("*") if file.is_file())
    assert size < (base / "model.safetensors").stat().st_size / 10


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_a_checkpoint_holds_the_adapter_of_its_step(ranks: list, out: Path, way: str) -> None:
    saved = _exported(checkpoint(out, way))
    torch.testing.assert_close(saved, _exported(checkpoint(out, "ddp")), rtol=0, atol=1e-5)
    assert not any(torch.equal(values, saved[name]) for name, values in _values(out / way / "adapter").items())


def _exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    adapter = checkpoint.parent / f"{checkpoint.name}-exported"
    export(checkpoint, adapter)
    return _values(adapter)


def _values(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_the_best_model_is_loaded_at_the_end(ranks: list, out: Path, way: str) -> None:
    best = f"{way}-best"
    loaded = _values(out / best / "adapter")
    torch.testing.assert_close(loaded, _exported(checkpoint(out, best, 2)), rtol=0, atol=0)
    others = _exported(checkpoint(out, best, 4))
    assert any(not torch.equal(values, others[name]) for name, values in loaded.items())
