"""training.chunked_loss on two ranks, against one process with the model's own loss."""

from pathlib import Path
from typing import Any

import pytest
from ranks import ForkServer
from torch.nn import functional
from trainer_cases import case, run_cases, zero_config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch has it from 2.13 on"),
]
HEADS = ["frozen", "selected", "whole"]
STEPS, BATCH = 6, 8
PARTITIONED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
CASES = {
    "ddp/selected": {},
    "zero2/whole": {"deepspeed": zero_config(2)},
    **{f"zero3/{head}": {"deepspeed": zero_config(3, **PARTITIONED)} for head in HEADS},
    "zero3-accumulated/selected": {
        "deepspeed": zero_config(3, **PARTITIONED),
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}


def _case(name: str, base: Path, rows: int, **training: Any) -> dict[str, Any]:
    training |= {"max_steps": STEPS, "learning_rate": 3e-2, "max_grad_norm": 0.7}
    rows //= training.get("gradient_accumulation_steps", 1)
    training["per_device_train_batch_size"] = rows
    return case(name, "causal-lm", base, STEPS * BATCH, **training) | {"head": name.split("/")[-1]}


@pytest.fixture(scope="module")
def one_process(fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    cases = [_case(head, bases["causal-lm"], BATCH) for head in HEADS]
    return run_cases(fork_server, 1, cases, tmp_path_factory.mktemp("one"), "chunked_loss_worker")[0]


@pytest.fixture(scope="module")
def two_ranks(fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    base = bases["causal-lm"]
    cases = [_case(name, base, BATCH // 2, chunked_loss=True, **training) for name, training in CASES.items()]
    return run_cases(fork_server, 2, cases, tmp_path_factory.mktemp("two"), "chunked_loss_worker")


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_one_process(one_process: dict, two_ranks: list[dict], name: str) -> None:
    expected = one_process[name.split("/")[-1]]
    assert max(expected["losses"]) - min(expected["losses"]) > 0.1
    for rank in two_ranks:
        assert rank[name]["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert rank[name]["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        assert not rank[name]["frozen_with_gradient"]
