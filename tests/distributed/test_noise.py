"""Random Position Noise through SparseTrainer: identical noise on any number of ranks, at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
from ranks import ForkServer
from trainer_cases import case, run_cases, zero_config

pytestmark = pytest.mark.distributed

STEPS, BATCH = 5, 8
STAGES = {
    "ddp": {},
    "zero1": {"deepspeed": zero_config(1)},
    "zero2": {"deepspeed": zero_config(2)},
    "zero3": {"deepspeed": zero_config(3, stage3_param_persistence_threshold=0)},
}
BY_SEQUENCE = {"probability": 0.3, "passes": 2, "scope": "sequence"}
BY_BATCH = {"probability": 0.3, "passes": 1, "scope": "batch"}


def _case(name: str, bases: dict[str, Path], ranks: int, noise: dict, **training: Any) -> dict[str, Any]:
    training |= {
        "per_device_train_batch_size": BATCH // ranks // training.get("gradient_accumulation_steps", 1),
        "max_steps": STEPS,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
    }
    return case(name, "causal-lm", bases["causal-lm"], STEPS * BATCH, **training) | {"rpn": noise}


@pytest.fixture(scope="module")
def one_process(
    fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    noises = {"none": {}, "sequence": BY_SEQUENCE, "batch": BY_BATCH}
    cases = [_case(name, bases, 1, noise) for name, noise in noises.items()]
    cases.append(_case("batch again", bases, 1, BY_BATCH))
    return run_cases(fork_server, 1, cases, tmp_path_factory.mktemp("one"), "noise_worker")[0]


@pytest.fixture(scope="module")
def several_ranks(
    fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """The first rank's losses of every stage, on 2 and on 4 ranks."""
    seen = {}
    for ranks, stages in ((2, STAGES), (4, {"zero2": STAGES["zero2"]})):
        cases = [_case(stage, bases, ranks, BY_SEQUENCE, **training) for stage, training in stages.items()]
        seen[ranks] = run_cases(fork_server, ranks, cases, tmp_path_factory.mktemp("several"), "noise_worker")[0]
    return seen


def test_noise_changes_what_is_learnt_and_the_clean_loss_is_reported(one_process: dict) -> None:
    quiet = one_process["none"]["losses"]
    for noise in ("sequence", "batch"):
        losses = one_process[noise]["losses"]
        assert losses[0] == pytest.approx(quiet[0], abs=1e-6)
        assert losses[1:] != pytest.approx(quiet[1:], abs=1e-3)
    assert one_process["sequence"]["losses"] != pytest.approx(one_process["batch"]["losses"], abs=1e-4)


def test_the_same_run_meets_the_same_noise(one_process: dict) -> None:
    assert one_process["batch again"]["losses"] == one_process["batch"]["losses"]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_on_the_noise_of_one_process(several_ranks: dict, one_process: dict, stage: str) -> None:
    assert several_ranks[2][stage]["losses"] == pytest.approx(one_process["sequence"]["losses"], abs=1e-5)


def test_four_ranks_train_on_the_noise_of_one_process(several_ranks: dict, one_process: dict) -> None:
    assert several_ranks[4]["zero2"]["losses"] == pytest.approx(one_process["sequence"]["losses"], abs=1e-5)
