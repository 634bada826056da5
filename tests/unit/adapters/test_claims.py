"""Adapters and base models that claim more than their files hold are refused before any work."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from adapter_cases import edit_config
from stranger_cases import AT_ONCE, NAME, claim, refused_everywhere, set_in

from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.errors import UserError
from sparse_zero.selection import checks, draws

HUGE = [10**7, 10**7]


def test_a_small_file_that_claims_a_huge_weight(adapters, bases, tmp_path):
    adapter = Path(shutil.copytree(adapters["bernoulli"], tmp_path / "adapter"))
    # As plausible as it can be: about as many positions as the file has values
    claim(adapter, shape=HUGE, probability=read_adapter(adapter).config.tensors[NAME].count / 10**14)
    message = refused_everywhere(adapter, bases["llama"], tmp_path / "out", but=("inspect",))
    assert "has shape [8, 16] in the model and [10000000, 10000000] in the adapter" in message
    facts = describe(adapter)
    assert "claims weights of 100,000,000,000" in facts["notes"][0]
    assert {change["position"] for change in facts["largest"]} == {None}


@pytest.mark.parametrize("kind", ["stratified", "magnitude"])
def test_positions_of_a_huge_weight_take_no_more_time_than_there_are_values(adapters, bases, tmp_path, kind):
    adapter = Path(shutil.copytree(adapters[kind], tmp_path / "adapter"))
    claim(adapter, shape=HUGE)
    if kind == "stratified":
        count = read_adapter(adapter).config.tensors[NAME].count
        claim(adapter, positions=checks.checksum(draws.stratified_positions(11, NAME, 10**14, count)))
    message = refused_everywhere(adapter, bases["llama"], tmp_path / "out", but=("inspect", "combine"))
    assert "has shape [8, 16] in the model" in message


@pytest.mark.parametrize("count", [10**7, 10**12, 2**63, 10**400])
def test_a_count_that_the_file_does_not_hold(llama, bases, tmp_path, count):
    claim(llama, shape=HUGE, count=count)
    refused_everywhere(llama, bases["llama"], tmp_path / "out")


def test_whole_rows_that_the_file_does_not_hold(llama, bases, tmp_path):
    claim(llama, shape=HUGE, whole_rows=[3, 10**7 - 1], count=2 * 10**7)
    refused_everywhere(llama, bases["llama"], tmp_path / "out")


@pytest.mark.parametrize(
    "claims",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 10**30},
        {"hidden_size": 10**7},
        {"vocab_size": 10**9, "hidden_size": 10**6},
        {"vocab_size": 10**15, "hidden_size": 10**15},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "2"},
        {"num_attention_heads": 0},
    ],
)
def test_a_base_model_that_claims_more_than_its_files_hold(adapters, bases, tmp_path, claims):
    """In the base model, and in the copy of its config that peft-sparta's adapters have."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    llama = Path(shutil.copytree(adapters["stratified"], tmp_path / "adapter"))
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    convert(llama, tmp_path / "sparta", "sparta")
    for config in (base / "config.json", tmp_path / "sparta" / "config.json"):
        set_in(config, **claims)
    for call in (
        lambda: write_merged(llama, tmp_path / "out"),
        lambda: convert(llama, tmp_path / "out", "shira"),
        lambda: convert(tmp_path / "sparta", tmp_path / "out"),
        lambda: convert(base, tmp_path / "out", base=str(bases["llama"])),
    ):
        started = time.monotonic()
        with pytest.raises(UserError):
            call()
        assert time.monotonic() - started < AT_ONCE
    assert not (tmp_path / "out").exists()


def test_pickled_tensors_that_claim_more_than_their_file_holds(adapters, tmp_path):
    convert(adapters["stratified"], tmp_path / "sparta", "sparta")
    (tmp_path / "sparta" / "sparse_deltas.safetensors").unlink()
    path = tmp_path / "sparta" / "sparse_deltas.pt"
    huge = torch.zeros(1).expand(10**7, 10**7)
    torch.save({"indices": {NAME: huge}, "deltas": {NAME: huge}}, path)
    assert path.stat().st_size < 20_000
    for call in (lambda: describe(tmp_path / "sparta"), lambda: convert(tmp_path / "sparta", tmp_path / "out")):
        with pytest.raises(UserError, match=r"sparse_deltas.pt: damaged \(a tensor of shape \[10000000, 10000000\]"):
            call()
