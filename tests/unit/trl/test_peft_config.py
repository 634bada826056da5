"""TRL's own trainers with adapters of `sparse_zero.peft`: their reference is the base model, or the loaded adapter."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
import trl_cases
from transformers import AutoTokenizer
from trl_cases import losses

from sparse_zero import load_adapter
from sparse_zero.peft import SparseZeroConfig

TRAINERS = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "reward": trl.RewardTrainer, "grpo": trl.GRPOTrainer}
SPARSE = {"density": 0.05, "targets": "all-linear"}


def theirs(objective: str, base: Path, out: Path, model: torch.nn.Module, **options: Any) -> Any:
    if objective == "grpo":
        options |= {"reward_funcs": trl_cases.reward}
    return TRAINERS[objective](
        model,
        args=trl_cases.arguments(objective, out, save_strategy="no"),
        train_dataset=trl_cases.rows(objective),
        processing_class=AutoTokenizer.from_pretrained(base),
        **options,
    )


@pytest.mark.parametrize("objective", ["dpo", "reward", "grpo"])
def test_a_peft_config_trains_as_a_sparse_model(objective: str, base: Path, tmp_path: Path):
    """Losses and adapter are those of our trainers; there is no second base model."""
    model = trl_cases.base_model(base, objective)
    run = theirs(objective, base, tmp_path / "theirs", model, peft_config=SparseZeroConfig(**SPARSE))
    run.train()
    ours = trl_cases.trainer(objective, base, tmp_path / "ours", save_strategy="no")
    ours.train()
    assert losses(run) == pytest.approx(losses(ours), abs=1e-6)
    assert len(set(losses(run))) == 4
    assert getattr(run, "ref_model", None) is None
    run.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(trl_cases.base_model(base, objective), tmp_path / "adapter")
    for name, weight in ours.model.sparsity.weights.items():
        assert torch.allclose(loaded.sparsity.weights[name].delta, weight.delta, atol=1e-5)


def test_the_reference_is_the_adapter_as_loaded(base: Path, tmp_path: Path):
    """TRL keeps it as an adapter called `ref`. The first loss is ln 2; all are those of our trainer."""
    sft = trl_cases.trainer("sft", base, tmp_path / "sft", save_strategy="no")
    sft.train()
    sft.save_model(str(tmp_path / "adapter"))
    model = peft.PeftModel.from_pretrained(trl_cases.base_model(base, "dpo"), tmp_path / "adapter", is_trainable=True)
    run = theirs("dpo", base, tmp_path / "theirs", model)
    run.train()
    loaded = load_adapter(trl_cases.base_model(base, "dpo"), tmp_path / "adapter")
    ours = trl_cases.trainer("dpo", base, tmp_path / "ours", model=loaded, save_strategy="no")
    ours.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run) == pytest.approx(losses(ours), abs=1e-6)
    assert run.ref_model is None
    assert list(run.model.peft_config) == ["default", "ref"]
