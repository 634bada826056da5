"""An adapter finds a base model that its recipe named by a relative path, from any working directory."""

import pytest
import torch
from families import tiny

from sparse_zero import SparseConfig, UserError, load_adapter, save_adapter, sparsify
from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.merging import write_merged


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """The adapter of a run in `my project`, trained on `models/base` there."""
    project = tmp_path / "my project"
    project.mkdir()
    monkeypatch.chdir(project)
    base = tiny("llama")
    base.save_pretrained("models/base")
    model = sparsify(base, SparseConfig(density=0.02))
    model.sparsity.base_model = "models/base"
    for weight in model.sparsity.weights.values():
        weight.delta.data.normal_()
    save_adapter(model, "runs/r/adapter")
    return project / "runs" / "r" / "adapter"


@pytest.mark.parametrize("place", ["elsewhere", "my project/sub"])
def test_a_merge_from_another_directory_finds_the_base(place, adapter, tmp_path, monkeypatch, caplog):
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / place)
    write_merged(adapter, "merged")
    assert f"its base model 'models/base' is taken from {tmp_path / 'my project' / 'models' / 'base'}" in caplog.text
    merged, expected = type(tiny("llama")).from_pretrained("merged"), tiny("llama")
    load_adapter(expected, adapter)
    ids = torch.arange(8)[None]
    assert torch.equal(merged.eval()(ids).logits, expected.eval()(ids).logits)


def test_a_base_in_the_working_directory_is_taken_first(adapter):
    assert read_config(adapter).base_model_name_or_path == "models/base"
    assert read_config("runs/r/adapter").base_model_name_or_path == "models/base"


def test_a_hub_id_stays_and_a_base_that_is_nowhere_is_named(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my project" / "models").rename(tmp_path / "my project" / "moved")
    assert read_config(adapter).base_model_name_or_path == "models/base"
    with pytest.raises(UserError, match="models/base"):
        write_merged(adapter, "merged")


def test_another_model_of_this_name_is_refused(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tiny("llama")
    torch.nn.init.normal_(next(other.parameters()))
    other.save_pretrained(tmp_path / "my project" / "models" / "base")
    with pytest.raises(UserError, match="different weights"):
        write_merged(adapter, "merged")
