"""TRL's four trainers on two ranks, by DDP and at ZeRO stages 2 and 3: they train as one process does, save an
adapter and resume exactly.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_cases
from ranks import ForkServer
from safetensors.torch import load_file
from trainer_cases import run_cases, zero_config
from trl_cases import OBJECTIVES

from sparse_zero import SparseConfig, save_adapter, sparsify

pytestmark = pytest.mark.distributed

STAGES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": zero_config(2)},
    "zero3": {
        "deepspeed": zero_config(
            3, stage3_param_persistence_threshold=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0
        )
    },
}
NAMES = [f"{objective}/{stage}" for objective in OBJECTIVES for stage in STAGES]
LOADED = [f"loaded/{stage}" for stage in STAGES]
"""DPO that starts from an adapter."""
SAMPLED = [f"sampled/{stage}" for stage in STAGES]
"""GRPO with completions that the ranks sample."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    trl_cases.save_base(directory)
    return directory


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with trained values."""
    directory = tmp_path_factory.mktemp("sft")
    config = SparseConfig(targets="all-linear", density=0.05, modules_to_save=["norm"])
    model = sparsify(trl_cases.base_model(base, "sft"), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, str(directory))
    return directory


def case(name: str, base: Path, sft: Path, batch: int, **training: Any) -> dict[str, Any]:
    kind = name.split("/")[0]
    objective = {"loaded": "dpo", "sampled": "grpo"}.get(kind, kind)
    training |= {"per_device_train_batch_size": batch, "save_steps": 2}
    return {
        "name": name,
        "objective": objective,
        "base": str(base),
        "loaded": str(sft) if kind == "loaded" else None,
        "is_fixed": kind == "grpo",
        "training": training,
    }


@pytest.fixture(scope="module")
def one_process(
    fork_server: ForkServer, base: Path, sft: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    cases = [case(name, base, sft, 8, save_strategy="no") for name in [*OBJECTIVES, "loaded"]]
    return run_cases(fork_server, 1, cases, tmp_path_factory.mktemp("one"), "trl_worker")[0]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_ranks(fork_server: ForkServer, base: Path, sft: Path, out: Path) -> list[dict[str, Any]]:
    cases = [case(name, base, sft, 4, **STAGES[name.split("/")[1]]) for name in [*NAMES, *LOADED, *SAMPLED]]
    return run_cases(fork_server, 2, cases, out, "trl_worker")


@pytest.mark.parametrize("name", [*NAMES, *LOADED])
def test_two_ranks_give_the_losses_of_one_process(two_ranks: list, one_process: dict, name: str) -> None:
    for rank in two_ranks:
        assert rank[name]["losses"] == pytest.approx(one_process[name.split("/")[0]]["losses"], abs=1e-4)
    assert len({round(loss, 5) for loss in two_ranks[0][name]["losses"]}) == 4


@pytest.mark.parametrize("name", [*NAMES, *LOADED, *SAMPLED])
def test_a_resumed_run_ends_as_the_uninterrupted_one(two_ranks: list, out: Path, name: str) -> None:
    for rank in two_ranks:
        assert rank[name]["resumed"] == rank[name]["losses"]
    trained, resumed = (load_file(out / name / kind / "adapter_model.safetensors") for kind in ("adapter", "resumed"))
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[parameter], resumed[parameter]) for parameter in trained)
    assert any(values.count_nonzero() for values in trained.values())


@pytest.mark.parametrize(
    "name", [name for name in [*NAMES, *LOADED, *SAMPLED] if name.split("/")[0] in "dpo grpo loaded sampled"]
)
def test_the_reference_is_no_second_model(two_ranks: list, name: str) -> None:
    assert two_ranks[0][name]["reference"] == "ReferencePolicy"


@pytest.mark.parametrize("name", [name for name in [*NAMES, *LOADED] if name.split("/")[0] in ("dpo", "loaded")])
def test_the_first_loss_of_dpo_is_ln_2(two_ranks: list, name: str) -> None:
    assert two_ranks[0][name]["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
