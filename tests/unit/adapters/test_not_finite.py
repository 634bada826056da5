"""Values that are NaN or infinite: saving warns, merging refuses and changes nothing, unless it is forced."""

import copy
import json

import pytest
import torch
from adapter_cases import fresh, logits, refusal, trained
from sparse_cases import assert_same_bits, plain_state
from torch import nn

from launcher.cli import main
from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.adapters.switching import merge_adapter, unmerge_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import merge_and_unload, sparsify
from sparse_zero.selection.config import SparseConfig

CONFIG = SparseConfig(density=0.5, targets=["0"], modules_to_save=["2"])


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def diverged() -> nn.Module:
    model = sparsify(mlp(), CONFIG)
    with torch.no_grad():
        model.sparsity.weights["0.weight"].delta[[1, 4]] = torch.tensor([torch.nan, -torch.inf])
        model[2].weight[0, 3] = torch.inf
        model[2].bias[1] = torch.nan
    return model


def test_saving_warns_once_and_saves(tmp_path, caplog):
    model = diverged()
    save_adapter(model, tmp_path)
    (warning,) = caplog.messages
    assert warning == f"{tmp_path}: saved values that are NaN or infinite: 0.weight (2 values) and 2 more parameters"
    delta = model.sparsity.weights["0.weight"].delta
    assert torch.equal(read_adapter(tmp_path).deltas["0.weight"].isfinite(), delta.isfinite())


def test_saving_finite_values_does_not_warn(tmp_path, caplog):
    save_adapter(sparsify(mlp(), CONFIG), tmp_path)
    assert caplog.messages == []


def test_rows_of_tokens_count_too(bases, tmp_path, caplog):
    config = SparseConfig(density=0.03, targets=["v_proj"], trainable_token_indices=[7])
    model = sparsify(fresh(bases["llama"]), config)
    with torch.no_grad():
        model.sparsity.weights["model.embed_tokens.weight"].delta[0] = torch.nan
    save_adapter(model, tmp_path)
    assert "NaN or infinite: model.embed_tokens.weight (1 value)" in caplog.text


@pytest.mark.parametrize("merge", [merge_adapter, merge_and_unload])
def test_merging_is_refused_before_anything_is_changed(merge):
    model = diverged()
    before, state = plain_state(model), dict(vars(model))
    with pytest.raises(
        UserError, match=r"^NaN or infinite: 0\.weight \(2 values\) and 2 more parameters; .*force=True"
    ):
        merge(model)
    assert_same_bits(plain_state(model), before)
    assert vars(model) == state


@pytest.mark.parametrize("merge", [merge_adapter, merge_and_unload])
def test_merging_is_refused_for_modules_that_are_trained_in_full_too(merge):
    model = sparsify(mlp(), CONFIG)
    nn.init.constant_(model[2].bias, torch.inf)
    with pytest.raises(UserError, match=r"2\.bias \(2 values\); "):
        merge(model)


def test_merging_can_be_forced():
    model = diverged()
    whole = copy.deepcopy(model)
    whole(torch.ones(1, 6))
    merge_adapter(model, force=True)
    assert_same_bits(plain_state(model), plain_state(whole))
    unmerge_adapter(model)
    assert_same_bits(plain_state(merge_and_unload(model, force=True)), plain_state(whole))


@pytest.fixture
def adapter(bases, tmp_path):
    model = trained(bases["llama"])
    with torch.no_grad():
        next(iter(model.sparsity.weights.values())).delta[0] = torch.nan
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_command_line(adapter, tmp_path, capsys, bases):
    out = tmp_path / "merged"
    assert main(["merge", str(adapter), str(out)]) == 2
    assert "NaN or infinite: model.layers.0" in capsys.readouterr().err
    assert not out.exists()
    assert main(["merge", str(adapter), str(out), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert logits(fresh(out)).isnan().any()


def test_write_merged(adapter, tmp_path):
    with pytest.raises(UserError, match="sparse-zero merge --force"):
        write_merged(adapter, tmp_path / "merged")
    write_merged(adapter, tmp_path / "merged", force=True)


def test_loading_such_an_adapter_is_refused_unless_it_is_forced(adapter, bases):
    assert "has values that are NaN or infinite: model.layers.0" in refusal(fresh(bases["llama"]), adapter)
    assert logits(load_adapter(fresh(bases["llama"]), adapter, force=True)).isnan().any()
