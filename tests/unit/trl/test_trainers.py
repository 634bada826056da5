"""TRL's trainers of sparse models in one process, against TRL's own, and against their uninterrupted runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl_cases
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl_cases import OBJECTIVES, losses, trainer

from sparse_zero import UserError, load_adapter, merge_and_unload
from sparse_zero.trl import SparseRLOOTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 3},
    "second-epoch": {"max_steps": 8, "gradient_checkpointing": True},
}
ROWS = {"second-epoch": {"grpo": 4}}
"""Few enough that the resumed step is in the second or third epoch."""


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_those_of_trls_own_trainer(objective: str, base: Path, tmp_path: Path):
    ours = trainer(objective, base, tmp_path / "ours")
    ours.train()
    theirs = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "reward": trl.RewardTrainer, "grpo": trl.GRPOTrainer}
    model = trl_cases.sparse_model(base, objective)
    model.config._name_or_path = str(base)  # from which TRL loads its reference
    options = {"reward_funcs": trl_cases.reward} if objective == "grpo" else {}
    plain = theirs[objective](
        model,
        args=trl_cases.arguments(objective, tmp_path / "theirs", save_strategy="no"),
        train_dataset=trl_cases.rows(objective),
        processing_class=AutoTokenizer.from_pretrained(base),
        **options,
    )
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-6)
    assert len(set(losses(ours))) == 4
    if objective in ("dpo", "grpo"):
        assert isinstance(plain.ref_model, torch.nn.Module), "TRL would load a second base"


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_ends_as_the_uninterrupted_one(objective: str, settings: str, base: Path, tmp_path: Path):
    given, count = SETTINGS[settings], ROWS.get(settings, {}).get(objective, 12)
    options = {"train_dataset": trl_cases.rows(objective, count)}
    whole = trainer(objective, base, tmp_path / "run", options=options, **given)
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    resumed = trainer(objective, base, tmp_path / "run", options=options, **given)
    torch.rand(9)  # the checkpoint has to restore the random states
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{given.get('max_steps', 4) - 1}"))
    resumed.save_model(str(tmp_path / "resumed"))
    before, after = adapter(tmp_path / "whole"), adapter(tmp_path / "resumed")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    def metrics(run: Any) -> list[dict[str, float]]:
        timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "train_loss")
        return [{k: v for k, v in entry.items() if k not in timings} for entry in run.state.log_history]

    assert metrics(resumed)[:-1] == metrics(whole)[:-1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_saved_adapter_opens_on_the_base(objective: str, base: Path, tmp_path: Path):
    trained = trainer(objective, base, tmp_path / "run", save_strategy="no")
    trained.train()
    trained.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "README.md").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    model = trl_cases.base_model(base, objective)
    ids = torch.tensor([[1, 9, 8, 7]])
    with torch.no_grad():
        untrained = model.eval()(input_ids=ids).logits
        load_adapter(model, str(tmp_path / "adapter"))
        loaded = model.eval()(input_ids=ids).logits
        assert torch.equal(loaded, trained.model.eval()(input_ids=ids).logits)
    assert not torch.allclose(loaded, untrained)


def test_trls_own_trainer_saves_an_adapter_too(base: Path, tmp_path: Path):
    plain = trl.SFTTrainer(
        trl_cases.sparse_model(base, "sft"),
        args=trl_cases.arguments("sft", tmp_path / "run", save_strategy="no"),
        train_dataset=trl_cases.rows("sft"),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    plain.train()
    plain.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    model = trl_cases.base_model(base, "sft")
    load_adapter(model, str(tmp_path / "adapter"))
    ids = torch.tensor([[1, 9, 8, 7]])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.model.eval()(input_ids=ids).logits)
    merged = merge_and_unload(model)
    assert not hasattr(merged, "sparsity")


def test_completions_of_several_steps(base: Path, tmp_path: Path):
    cycles = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 8}
    with pytest.raises(UserError, match=r"training.save_steps: 3: .* for 4 steps .* use a multiple of 4"):
        trainer("grpo", base, tmp_path / "run", save_steps=3, **cycles).train()
    whole = trainer("grpo", base, tmp_path / "run", save_steps=4, **cycles)
    whole.train()
    resumed = trainer("grpo", base, tmp_path / "run", save_steps=4, **cycles)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 8


def test_rloo(base: Path, tmp_path: Path):
    settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "max_steps": 3, "save_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 4}

    def rloo() -> SparseRLOOTrainer:
        return SparseRLOOTrainer(
            trl_cases.sparse_model(base, "grpo"),
            reward_funcs=trl_cases.reward,
            args=trl.RLOOConfig(str(tmp_path), logging_steps=1, learning_rate=2e-2, **settings),
            train_dataset=trl_cases.rows("grpo"),
            processing_class=AutoTokenizer.from_pretrained(base),
        )

    whole, resumed = rloo(), rloo()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    rewards = [[entry["reward"] for entry in run.state.log_history if "reward" in entry] for run in (whole, resumed)]
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) == 3
    trained = [dict(run.model.state_dict()) for run in (whole, resumed)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_progress_counts_what_is_trained_on(base: Path, tmp_path: Path):
    seen = []
    run = trainer("grpo", base, tmp_path, steps_per_generation=2, gradient_accumulation_steps=2, save_strategy="no")
    run._progress_shown.count = seen.append
    run.train()
    assert len(seen) == 8
    assert all(len(batch["completion_ids"]) == 4 for batch in seen)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"load 'some/model' and call sparsify on it"):
        trainer("dpo", base, tmp_path, model="some/model")
    with pytest.raises(UserError, match="is not sparse"):
        trainer("sft", base, tmp_path, model=trl_cases.base_model(base, "sft"))
    with pytest.raises(UserError, match="peft_config: the model is sparse already"):
        trainer("sft", base, tmp_path, options={"peft_config": object()})
    with pytest.raises(UserError, match="sync_ref_model: the reference of a sparse model is fixed"):
        trainer("dpo", base, tmp_path, sync_ref_model=True)
    with pytest.raises(UserError, match="use_vllm: vLLM does not know the deltas"):
        trainer("grpo", base, tmp_path, use_vllm=True)


def test_damaged_metrics_are_refused(base: Path, tmp_path: Path):
    trainer("sft", base, tmp_path, max_steps=2).train()
    run = trainer("sft", base, tmp_path, max_steps=2)
    state = next(callback for callback in run.callback_handler.callbacks if type(callback).__name__ == "TRLState")
    saved = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    state.text = saved["stateful_callbacks"]["TRLState"]["attributes"]["text"]
    assert run._total_train_tokens > 0
    for text in ("{", '{"metrics": {"train": 3}, "counts": {}}', '{"metrics": {}, "counts": {"train_dataset": 1}}'):
        with pytest.raises(UserError, match=r"trainer_state.json: damaged: TRLState"):
            state.text = text
