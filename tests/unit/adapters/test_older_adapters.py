"""Adapters written by version 0.1 load with the values that version 0.1 had."""

import shutil
from pathlib import Path

import older_version
import pytest
import torch
from older_version import EXPECTED, make
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_zero import SparseConfig, UserError, load_adapter, merge_and_unload, save_adapter, sparsify
from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged

ADAPTERS = older_version.DIRECTORY / "adapters"


def base(name: str) -> nn.Module:
    family, _ = make.ADAPTERS[name]
    model = make.base_model(family)
    return make.grown(model) if name == "tokens" else model


def assert_expected(model: nn.Module, name: str) -> None:
    """The model has the logits of version 0.1's, and its merged parameters bit for bit."""
    logits = make.last_logits(model, make.ADAPTERS[name][0], name)
    torch.testing.assert_close(logits, EXPECTED["adapters"][name]["logits"], rtol=1e-4, atol=1e-5)
    merged = merge_and_unload(model)
    assert make.digest(dict(merged.named_parameters())) == EXPECTED["adapters"][name]["merged"]


@pytest.mark.parametrize("name", make.ADAPTERS)
def test_an_adapter_loads_on_its_base(name):
    untrained = make.last_logits(base(name), make.ADAPTERS[name][0], name)
    assert (torch.tensor(untrained) - torch.tensor(EXPECTED["adapters"][name]["logits"])).abs().max() > 0.05
    assert_expected(load_adapter(base(name), ADAPTERS / name), name)


@pytest.mark.parametrize("name", sorted(set(make.ADAPTERS) - {"tokens"}))
def test_an_adapter_loads_into_a_model_that_is_sparse_already(name):
    """The same config selects the same positions; otherwise load_adapter fails."""
    model = sparsify(base(name), SparseConfig(seed=1, **make.ADAPTERS[name][1]))
    assert_expected(load_adapter(model, ADAPTERS / name), name)


@pytest.mark.parametrize("name", make.ADAPTERS)
def test_saved_again_the_values_are_the_same(tmp_path, name):
    save_adapter(load_adapter(base(name), ADAPTERS / name), tmp_path)
    before, after = read_adapter(ADAPTERS / name), read_adapter(tmp_path)
    for part in ("deltas", "whole", "rows", "stored_positions"):
        one, other = getattr(before, part), getattr(after, part)
        assert one.keys() == other.keys()
        assert make.digest(one) == make.digest(other), part
    assert {n: t.positions for n, t in before.config.tensors.items()} == {
        n: t.positions for n, t in after.config.tensors.items()
    }


def test_another_base_is_recognised():
    model = base("stratified")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight"):
        load_adapter(model, ADAPTERS / "stratified")


def test_the_merge_command_finds_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older_version.save_bases(tmp_path)
    write_merged(ADAPTERS / "stratified", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert make.digest(dict(merged.named_parameters())) == EXPECTED["adapters"]["stratified"]["merged"]


@pytest.mark.parametrize("kind", make.CONVERTED)
def test_a_converted_adapter_converts_back(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    older_version.save_bases(tmp_path)
    # The path of its base model is relative to the working directory
    source: Path = tmp_path / kind
    shutil.copytree(ADAPTERS / kind, source)
    convert(source, tmp_path / "back")
    name = make.CONVERTED[kind]
    assert_expected(load_adapter(base(name), tmp_path / "back"), name)


@pytest.mark.parametrize("name", [*make.ADAPTERS, *make.CONVERTED])
def test_an_adapter_is_described(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    older_version.save_bases(tmp_path)
    facts = describe(ADAPTERS / name)
    assert facts["base_model"] in ("base/llama", "base/bert")
    scalars = sum(entry["scalars"] for entry in facts["tensors"])
    assert facts["trainable_parameters"] == scalars > 30
