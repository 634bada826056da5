"""Checkpoints of trainers: what is resumed is what was saved, or an error."""

from pathlib import Path

import pytest
import torch
from families import tiny
from sparse_cases import batch_of
from torch import nn
from transformers import Trainer, TrainingArguments

from sparse_zero import SparseConfig, SparseTrainer, load_adapter, save_adapter, sparsify


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.b(torch.tanh(self.norm(self.a(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


CONFIG = SparseConfig(density=0.4, targets=["a", "b"], modules_to_save=["norm"])
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [{"x": torch.randn(10, generator=GENERATOR) * 3 + 2, "labels": index % 2} for index in range(32)]


def arguments(directory: Path, steps: int, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        str(directory),
        max_steps=steps,
        report_to=[],
        use_cpu=True,
        learning_rate=0.05,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=4,
        **settings,
    )


def evaluated(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.stack([row["x"] for row in ROWS]), torch.zeros(32, dtype=torch.long))["logits"]


def test_the_adapter_of_a_run_has_the_running_statistics(tmp_path):
    model = sparsify(Normalized(), CONFIG)
    trainer = SparseTrainer(model, arguments(tmp_path, 2), train_dataset=ROWS)
    trainer.train()
    trainer.save_model(tmp_path / "one")
    save_adapter(model, tmp_path / "other")
    assert model.norm.num_batches_tracked == 2
    for name in ("one", "other"):
        assert torch.equal(evaluated(load_adapter(Normalized(), tmp_path / name)), evaluated(model))


def test_a_resumed_run_has_the_running_statistics(tmp_path):
    whole, resumed = sparsify(Normalized(), CONFIG), sparsify(Normalized(), CONFIG)
    SparseTrainer(whole, arguments(tmp_path, 4), train_dataset=ROWS).train()
    again = SparseTrainer(resumed, arguments(tmp_path, 4), train_dataset=ROWS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.norm.num_batches_tracked == whole.norm.num_batches_tracked
    torch.testing.assert_close(evaluated(resumed), evaluated(whole))


def test_the_trainer_of_transformers_refuses_to_resume(tmp_path):
    """Its checkpoints have the adapter, which it would only find in a PeftModel; SparseTrainer resumes."""
    rows = [{"input_ids": row, "labels": row} for row in batch_of("llama")["input_ids"]]
    Trainer(sparsify(tiny("llama"), SparseConfig(density=0.1)), arguments(tmp_path, 2), train_dataset=rows).train()
    again = Trainer(sparsify(tiny("llama"), SparseConfig(density=0.1)), arguments(tmp_path, 4), train_dataset=rows)
    with pytest.raises(ValueError, match="checkpoint"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
