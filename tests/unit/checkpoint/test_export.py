"""An exported checkpoint is, bit for bit, the adapter that the trained model would have saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from launcher.cli import main
from sparse_zero import SparseConfig, SparseTrainer, UserError, load_adapter, sparsify
from sparse_zero.checkpoint.export import export
from sparse_zero.recipe.training import TrainingArguments

WAYS: dict[str, dict[str, Any]] = {
    "stratified": {},
    "strips": {"granularity": 4},
    "bernoulli": {"selection": "bernoulli"},
    "stored positions": {"selection": "magnitude"},
    "rows and scalars": {"targets": ["query", "word_embeddings"], "trainable_token_indices": [3, 7]},
    "rows alone": {"trainable_token_indices": [3, 7]},
    "stored positions and rows": {
        "selection": "magnitude",
        "targets": ["word_embeddings"],
        "trainable_token_indices": [0, 29],
    },
}


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return BertForSequenceClassification(config)


def train(out: Path, **sparse: Any) -> SparseTrainer:
    trained = sparsify(model(), SparseConfig(density=0.03, **sparse))
    rows = [{"input_ids": torch.randint(0, 30, (8,)).tolist(), "labels": n % 2} for n in range(12)]
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.1, "logging_steps": 1}
    arguments = TrainingArguments(str(out), **quiet, max_steps=2, save_steps=2)
    trainer = SparseTrainer(trained, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return trainer


@pytest.mark.parametrize("name", WAYS)
def test_an_export_is_the_saved_adapter(tmp_path: Path, name: str) -> None:
    train(tmp_path, **WAYS[name])
    facts = export(tmp_path / "checkpoint-2", tmp_path / "exported")
    saved, exported = tmp_path / "adapter", tmp_path / "exported"
    names = sorted(path.name for path in saved.iterdir())
    assert sorted(path.name for path in exported.iterdir()) == names
    assert ("adapter_positions.safetensors" in names) == ("stored" in name)
    for file in (file for file in names if file.endswith(".safetensors")):
        expected, found = load_file(saved / file), load_file(exported / file)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key].dtype == values.dtype
            assert torch.equal(found[key], values), key
    expected, found = (json.loads((d / "adapter_config.json").read_text()) for d in (saved, exported))
    assert found | {"files": None} == expected | {"files": None}
    assert facts["trainable_parameters"] == expected["trainable_parameters"]
    load_adapter(model(), exported)


def test_a_runs_directory_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    train(tmp_path)
    assert export(tmp_path, tmp_path / "exported")["checkpoint"] == str(tmp_path / "checkpoint-2")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tmp_path)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "checkpoint-2"), str(tmp_path / "exported"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "exported")]) == 2
    assert "nothing: no such checkpoint" in capsys.readouterr().err


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    shard = tmp_path / "checkpoint-2" / "shard-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard}: damaged"):
        export(tmp_path / "checkpoint-2", tmp_path / "exported")
    assert not (tmp_path / "exported" / "adapter_config.json").exists()


@pytest.mark.parametrize(("checkpoint", "message"), [("nothing", "no such checkpoint"), (".", "not a complete")])
def test_no_checkpoint(tmp_path: Path, checkpoint: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(tmp_path / checkpoint, tmp_path / "exported")
