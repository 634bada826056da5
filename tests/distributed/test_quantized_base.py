"""A quantised base on several ranks: the losses of one process, the bytes of each rank, and runs that are resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ForkServer
from safetensors.torch import load_file
from trainer_cases import case, run_cases, zero_config

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = pytest.mark.distributed

TASK, RANKS, STEPS, SAVED = "causal-lm", 2, 4, 2
TRAINING = {"max_steps": STEPS, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
COLUMNS, SCATTERED = {"columns": "whole"}, {}
STAGE_3 = {"deepspeed": zero_config(3, stage3_param_persistence_threshold=0)}
ALIKE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("nf4", COLUMNS, {}),
    "zero0": ("nf4", COLUMNS, {"deepspeed": zero_config(0)}),
    "zero1": ("nf4", COLUMNS, {"deepspeed": zero_config(1)}),
    "zero2": ("nf4", COLUMNS, {"deepspeed": zero_config(2)}),
    "zero3": ("nf4", COLUMNS, STAGE_3),
    "zero3-bytes": ("nf4", COLUMNS, STAGE_3),
    "zero3-scattered": ("nf4", SCATTERED, STAGE_3 | {"gradient_checkpointing": True}),
    "zero2-int8": ("int8", COLUMNS, {"deepspeed": zero_config(2)}),
    "zero3-int8": ("int8", COLUMNS, STAGE_3),
    "zero3-int8-some": ("int8", COLUMNS | {"targets": ["v_proj", "down_proj"]}, STAGE_3),
    "ddp-torchao": ("int8_weight_only", COLUMNS, {}),
    "zero0-torchao": ("int8_weight_only", COLUMNS, {"deepspeed": zero_config(0)}),
    "zero1-torchao": ("int8_weight_only", COLUMNS, {"deepspeed": zero_config(1)}),
    "zero2-torchao": ("int8_weight_only", COLUMNS, {"deepspeed": zero_config(2)}),
}
"""Kind, selection and training arguments of runs in float32."""
IN_BYTES = ("ddp", "zero3-bytes")
"""Runs whose packed weights are stored in uint8, as bitsandbytes does by default, and not in the training's dtype."""
HALF = {
    "zero3-bfloat16": ("nf4", COLUMNS, STAGE_3 | {"bf16": True}),
    "zero3-int8-bfloat16": ("int8", COLUMNS, STAGE_3 | {"bf16": True}),
    "zero2-torchao-bfloat16": ("int8_weight_only", COLUMNS, {"deepspeed": zero_config(2), "bf16": True}),
}
SINGLE = {
    "columns": ("nf4", COLUMNS),
    "scattered": ("nf4", SCATTERED),
    "int8-some": ("int8", COLUMNS | {"targets": ["v_proj", "down_proj"]}),
    "int8": ("int8", COLUMNS),
    "torchao": ("int8_weight_only", COLUMNS),
}
RESUMED = ("zero2", "zero3", "zero2-torchao")


def quantized_case(name: str, base: Path, kind: str, sparse: dict, batch: int, **training: Any) -> dict[str, Any]:
    settings = TRAINING | {"per_device_train_batch_size": batch} | training
    storage = {"storage": "uint8"} if name in IN_BYTES else {}
    return case(name, TASK, base, 4 * STEPS, **settings) | {"kind": kind, "sparse": sparse} | storage


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def single(fork_server: ForkServer, bases: dict[str, Path], out: Path) -> dict[str, Any]:
    """Runs of one process with the batches of both ranks."""
    directory = out / "single"
    directory.mkdir()
    cases = [quantized_case(name, bases[TASK], *how, 4) for name, how in SINGLE.items()]
    return run_cases(fork_server, 1, cases, directory, "quantized_worker")[0]


@pytest.fixture(scope="module")
def ranks(fork_server: ForkServer, bases: dict[str, Path], out: Path) -> list[dict[str, Any]]:
    """All runs on two ranks. Those that are resumed have saved a checkpoint on their way."""
    saves = {"save_strategy": "steps", "save_steps": SAVED}
    cases = []
    for name, (kind, sparse, training) in (ALIKE | HALF).items():
        saving = saves if name in RESUMED else {}
        cases.append(quantized_case(name, bases[TASK], kind, sparse, 2, **training, **saving))
    for name in RESUMED:
        kind, sparse, training = ALIKE[name]
        resumed = quantized_case(f"{name}-resumed", bases[TASK], kind, sparse, 2, **training)
        cases.append(resumed | {"resume": str(out / name / f"checkpoint-{SAVED}")})
    # Stage 3 replaces the function F.linear of its process for good, by one that torchao's tensors do not have
    cases.sort(key=lambda case: "zero3" in case["name"])
    return run_cases(fork_server, RANKS, cases, out, "quantized_worker")


@pytest.mark.parametrize("name", ALIKE)
def test_the_losses_are_those_of_one_process(single: dict[str, Any], ranks: list, name: str) -> None:
    expected = single[next((kind for kind in SINGLE if kind in name), "columns")]
    assert max(expected["losses"]) - min(expected["losses"]) > (0.02 if "some" in name else 0.1)
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(expected["losses"], abs=1e-4)


NEAR = {"zero3-bfloat16": "columns", "zero3-int8-bfloat16": "int8", "zero2-torchao-bfloat16": "torchao"}


@pytest.mark.parametrize(("name", "like"), NEAR.items())
def test_runs_in_bfloat16_are_near(single: dict[str, Any], ranks: list, name: str, like: str) -> None:
    assert ranks[0][name]["losses"] == pytest.approx(single[like]["losses"], abs=0.1)


@pytest.mark.parametrize("name", [*ALIKE, *HALF])
def test_nothing_is_written_into_the_packed_weights(ranks: list, name: str) -> None:
    for rank in ranks:
        assert rank[name]["changed"] == []
        assert rank[name]["frozen_with_gradient"] == []


@pytest.mark.parametrize("name", [*ALIKE, *HALF])
def test_the_bytes_of_the_base_on_each_rank(ranks: list, name: str) -> None:
    """Stage 3 partitions the packed weights (peft#2016); the others have all of them."""
    for rank in ranks:
        share = RANKS if "zero3" in name else 1
        packed = rank[name]["packed_bytes"]
        assert abs(rank[name]["held_bytes"] - packed / share) <= 0.05 * packed / share


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "zero3-bfloat16", "zero2-torchao"])
def test_the_optimizer_has_twelve_bytes_per_trained_scalar(ranks: list, name: str) -> None:
    for rank in ranks:
        trained = rank[name]["trained"]
        # DDP keeps the float32 values in the parameters; ZeRO pads its partitions
        expected = 8 * trained if name == "ddp" else 12 * trained / RANKS
        assert expected <= rank[name]["optimizer_bytes"] <= expected * 1.02 + 512


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(ranks: list, out: Path, name: str) -> None:
    for rank in ranks:
        assert len(rank[name]["norms"]) == STEPS
        for seen in ("losses", "norms"):
            assert rank[f"{name}-resumed"][seen] == rank[name][seen]
    one, other = (load_file(out / run / "adapter" / "adapter_model.safetensors") for run in (name, f"{name}-resumed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
