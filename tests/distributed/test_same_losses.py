"""SparseTrainer on two ranks, at every ZeRO stage, against one process and against the dense reference."""

from typing import Any

import dense_reference
import pytest
import tiny
import torch
from safetensors.torch import load_file
from trainer_cases import case, run_cases, zero_config

pytestmark = pytest.mark.distributed

TASKS = ["causal-lm", "sequence-classification"]
STAGES = {"ddp": None, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
STEPS, BATCH, RANKS = 10, 8, 2
OPTIMIZER = {"learning_rate": 3e-2, "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.9}

BATCHES = {
    "whole": {"per_device_train_batch_size": BATCH // RANKS},
    "accumulated": {
        "per_device_train_batch_size": BATCH // RANKS // 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}
"""Two ways to the same optimizer step."""

FLOAT32 = [f"{task}-{stage}-{batch}" for task in TASKS for stage in STAGES for batch in BATCHES]
BFLOAT16 = [f"{task}-{stage}-bf16" for task in TASKS for stage in ("zero2", "zero3")]


def _case(name: str, bases: dict, stage: int | None, **training: Any) -> dict[str, Any]:
    task = next(task for task in TASKS if name.startswith(task))
    deepspeed = {} if stage is None else {"deepspeed": zero_config(stage)}
    training |= OPTIMIZER | {"max_steps": STEPS, "lr_scheduler_type": "linear"} | deepspeed
    return case(name, task, bases[task], STEPS * BATCH, **training)


@pytest.fixture(scope="module")
def one_process(bases: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process sees, by task, and with bfloat16 by case."""
    whole = {"per_device_train_batch_size": BATCH}
    cases = [_case(task, bases, None, **whole) for task in TASKS]
    cases += [_case(name, bases, int(name[-6]), bf16=True, **whole) for name in BFLOAT16]
    return run_cases(1, cases, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_ranks(bases: dict, out) -> list[dict[str, Any]]:
    """What each of two ranks sees, by case."""
    cases = [
        _case(f"{task}-{stage}-{batch}", bases, STAGES[stage], **BATCHES[batch])
        for task in TASKS
        for stage in STAGES
        for batch in BATCHES
    ]
    cases += [_case(name, bases, int(name[-6]), bf16=True, **BATCHES["whole"]) for name in BFLOAT16]
    return run_cases(RANKS, cases, out)


@pytest.fixture(scope="module")
def reference(bases: dict) -> dict[str, dense_reference.Curve]:
    return {
        task: dense_reference.train(bases[task], task, tiny.examples(task, STEPS * BATCH), BATCH, **OPTIMIZER)
        for task in TASKS
    }


@pytest.mark.parametrize("task", TASKS)
def test_show(one_process, two_ranks, reference, task):
    print(reference[task].losses, reference[task].norms)
    print(one_process[task]["losses"], one_process[task]["norms"])
    for r in two_ranks:
        for n, v in r.items():
            if n.startswith(task):
                d = max(abs(a-b) for a, b in zip(v["losses"], reference[task].losses))
                dn = v["norms"][0] and max(abs(a-b) for a, b in zip(v["norms"], reference[task].norms))
                print(n, d, dn, v["state"], v["trainable_dtypes"], v["frozen_with_gradient"], v["optimizer_bytes"], v["built"])
    for n, v in one_process.items():
        if "bf16" in n: print(n, v)
