"""The statistics of a BatchNorm that is trained in full: they are in checkpoints, exports and resumed runs."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from sparse_zero import SparseConfig, SparseTrainer, load_adapter, sparsify
from sparse_zero.checkpoint.export import export
from sparse_zero.checkpoint.manifest import read_manifest, write_manifest
from sparse_zero.recipe.training import TrainingArguments

BUFFERS = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(out: Path, steps: int) -> SparseTrainer:
    model = sparsify(Net(), SparseConfig(density=0.3, targets=["2"], modules_to_save=["1"]))
    numbers = torch.Generator().manual_seed(1)
    rows = [{"x": 3 * torch.randn(6, generator=numbers) + 1, "labels": n % 3} for n in range(32)]
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.1, "save_steps": 2}
    return SparseTrainer(model, TrainingArguments(str(out), **quiet, max_steps=steps), train_dataset=rows)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in BUFFERS}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def test_a_resumed_run_and_an_export_have_them(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trained = statistics(whole.model)
    assert trained["1.num_batches_tracked"] == 4
    assert trained["1.running_mean"].abs().max() > 0.01
    trainer(tmp_path / "resumed", 2).train()
    resumed = trainer(tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(statistics(resumed.model), trained)
    export(tmp_path / "whole" / "checkpoint-4", tmp_path / "exported")
    whole.save_model(str(tmp_path / "saved"))
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exported", "saved")]
    assert set(BUFFERS) < files[0].keys()
    assert_equal(*files)
    loaded = load_adapter(Net(), tmp_path / "exported")
    x, labels = torch.randn(5, 6), torch.zeros(5, dtype=torch.long)
    assert torch.equal(loaded.eval()(x, labels)["logits"], whole.model.eval()(x, labels)["logits"])


def test_a_checkpoint_without_them_is_resumed(tmp_path: Path) -> None:
    """Version 0.1 did not save buffers."""
    trainer(tmp_path, 2).train()
    manifest = read_manifest(tmp_path / "checkpoint-2")
    trained = manifest.adapter["modules_to_save"]
    manifest.adapter["modules_to_save"] = [name for name in trained if name not in BUFFERS]
    del manifest.files["fixed.safetensors"]
    write_manifest(tmp_path / "checkpoint-2", manifest)
    (tmp_path / "checkpoint-2" / "fixed.safetensors").unlink()
    resumed = trainer(tmp_path, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert statistics(resumed.model)["1.num_batches_tracked"] == 2
