"""A PeftModel with a sparse adapter on two ranks, with DDP and at ZeRO stages 2 and 3.

A small or empty adapter under stage 3 is what PEFT's users meet elsewhere: trl#4416, peft#2892, DeepSpeed#7900.
"""

import json
from pathlib import Path

import pytest
import tiny
import torch
from loops_worker import TASK
from peft import PeftModel
from peft_worker import STAGES
from ranks import run_ranks
from safetensors.torch import load_file

import sparse_zero.peft  # noqa: F401
from sparse_zero import load_adapter

pytestmark = pytest.mark.distributed

RANKS = 2


@pytest.fixture(scope="module")
def out(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks have written."""
    out = tmp_path_factory.mktemp("peft")
    run = run_ranks(RANKS, Path(__file__).with_name("peft_worker.py"), bases[TASK], out)
    assert run.left_over == []
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_are_those_of_the_sparse_model(out: Path, stage: int | None) -> None:
    for rank in range(RANKS):
        losses = json.loads((out / f"rank{rank}.json").read_text())
        assert losses[f"peft{stage}"] == pytest.approx(losses[f"sparse{stage}"], abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer_saves_the_adapter(bases: dict[str, Path], out: Path, stage: int | None) -> None:
    saved, by_hand, expected = (
        load_file(out / name / "adapter_model.safetensors")
        for name in (f"peft{stage}", f"peft{stage}-by-hand", f"sparse{stage}")
    )
    assert saved.keys() == by_hand.keys() == expected.keys()
    for name, values in saved.items():
        assert torch.equal(values, by_hand[name])
        torch.testing.assert_close(values, expected[name])
        assert values.abs().max() > 0

    def outputs(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(3, 11)[None]).logits

    def base() -> torch.nn.Module:
        return tiny.AUTO_CLASS[TASK].from_pretrained(bases[TASK])

    loaded = PeftModel.from_pretrained(base(), out / f"peft{stage}")
    assert torch.equal(outputs(loaded), outputs(load_adapter(base(), out / f"peft{stage}-by-hand")))
