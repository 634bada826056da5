"""A checkpoint that version 0.1 wrote on two ranks is exported and resumed as version 0.1 would have."""

import shutil

import older_version
import pytest
import torch
from older_version import EXPECTED, make
from safetensors.torch import load_file

from sparse_zero import UserError, load_adapter
from sparse_zero.checkpoint.export import export

CHECKPOINT = older_version.DIRECTORY / f"checkpoint-{make.SAVED}"


def test_it_is_exported(tmp_path):
    export(CHECKPOINT, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert make.digest(tensors) == EXPECTED["checkpoint"]["exported"]
    model = load_adapter(make.base_model("llama"), tmp_path / "adapter")
    assert model.sparsity.trainable_parameters == sum(values.numel() for values in tensors.values())


def test_it_is_resumed_on_one_rank(tmp_path, monkeypatch):
    """float32 on another number of ranks: losses within 1e-4."""
    monkeypatch.chdir(tmp_path)
    older_version.save_bases(tmp_path)
    shutil.copytree(CHECKPOINT, tmp_path / "run" / CHECKPOINT.name)
    run = make.trainer(tmp_path / "run", ranks=1)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == make.STEPS
    losses = make.losses(run.state.log_history)
    torch.testing.assert_close(losses, EXPECTED["checkpoint"]["losses"], rtol=0, atol=1e-4)
    fresh = make.trainer(tmp_path / "fresh", ranks=1, max_steps=make.SAVED + 1)
    fresh.train()
    later = make.losses(fresh.state.log_history)
    assert abs(later[0] - losses[make.SAVED]) > 0.05, "a run from the start would not have these losses"


def test_a_damaged_shard_is_named(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / CHECKPOINT.name)
    shard = tmp_path / CHECKPOINT.name / "shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="shard-00001-of-00002"):
        export(tmp_path / CHECKPOINT.name, tmp_path / "adapter")
