"""A base that is partitioned while it is loaded (ZeRO stage 3): train, save, load and merge on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import ForkServer
from safetensors.torch import load_file
from trainer_cases import case, run_cases, zero_config

from sparse_zero.selection import draws

pytestmark = pytest.mark.distributed

TASK, RANKS = "sequence-classification", 2
DEEPSPEED = {
    "zero2": zero_config(2),
    "zero3": zero_config(3, stage3_param_persistence_threshold=0),
    "zero3-persistent": zero_config(3),  # 100,000 scalars: every parameter stays whole on each rank
}
STAGE3 = ["zero3", "zero3-persistent"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("partitioned")


@pytest.fixture(scope="module")
def ranks(fork_server: ForkServer, bases: dict[str, Path], out: Path) -> list[dict[str, Any]]:
    """What each rank sees: a run of each stage, and stage 2's adapter loaded by the runs of stage 3."""
    training = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 3e-2}
    cases = [case(way, TASK, bases[TASK], 40, deepspeed=config, **training) for way, config in DEEPSPEED.items()]
    cases += [
        case(f"{way}-loads", TASK, bases[TASK], 8, deepspeed=DEEPSPEED[way]) | {"load": str(out / "zero2" / "adapter")}
        for way in STAGE3
    ]
    return run_cases(fork_server, RANKS, cases, out, worker="partitioned_worker")


def _adapter(out: Path, way: str) -> dict[str, torch.Tensor]:
    return load_file(out / way / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("way", STAGE3)
def test_the_base_is_partitioned_and_stays_float32(ranks: list, way: str) -> None:
    for rank in ranks:
        assert rank[way]["partitioned"] == rank[way]["parameters"] > 0
        assert rank[way]["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("way", STAGE3)
def test_the_saved_adapter_is_that_of_stage_2(ranks: list, out: Path, way: str) -> None:
    expected, saved = _adapter(out, "zero2"), _adapter(out, way)
    assert {name: len(values) for name, values in saved.items()} == {
        **tiny.selected_counts(TASK),
        **dict.fromkeys(tiny.head_of(TASK), 2),
    }
    for values in expected.values():
        assert values.abs().max() > 1e-2
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [*DEEPSPEED, *[f"{way}-loads" for way in STAGE3]])
@pytest.mark.parametrize("rank", range(RANKS))
def test_merging_writes_the_values_and_nothing_else(bases: dict, ranks: list, out: Path, way: str, rank: int) -> None:
    expected = load_file(bases[TASK] / "model.safetensors")
    for name, values in _adapter(out, way).items():
        if name in tiny.head_of(TASK):
            expected[name] = values
        else:
            expected[name].view(-1)[draws.stratified_positions(0, name, expected[name].numel(), len(values))] += values
    torch.testing.assert_close(torch.load(out / way / f"merged{rank}.pt"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", STAGE3)
def test_an_adapter_loads_onto_a_partitioned_base(bases: dict, ranks: list, out: Path, way: str) -> None:
    merged = tiny.AUTO_CLASS[TASK].from_pretrained(bases[TASK])
    merged.load_state_dict(torch.load(out / "zero2" / "merged0.pt"))
    batch = {
        key: torch.tensor([example[key] for example in tiny.examples(TASK, 8)])
        for key in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        expected = merged.eval()(**batch).logits
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank[f"{way}-loads"]["logits"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", STAGE3)
def test_a_loaded_adapter_is_saved_as_it_was(ranks: list, out: Path, way: str) -> None:
    torch.testing.assert_close(_adapter(out, f"{way}-loads"), _adapter(out, "zero2"), rtol=0, atol=0)
