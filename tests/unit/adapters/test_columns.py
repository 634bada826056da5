"""Adapters whose scalars were drawn within columns: saved, opened, inspected, combined, converted, switched."""

import json

import pytest
import torch
from adapter_cases import FAMILIES, edit_config, fresh, logits, refusal, train

from sparse_zero import SparseTrainer, UserError, disable_adapter, set_adapter, unload
from sparse_zero.adapters.combine import combine_adapters
from sparse_zero.adapters.files import CONFIG_NAME, POSITIONS_NAME, read_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.checkpoint.export import export
from sparse_zero.model.sparsify import sparsify
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.selection.columns import COLUMNS
from sparse_zero.selection.config import SparseConfig

SETTINGS = {"targets": "all-linear", "density": 0.08}
COLUMN_SETTINGS = pytest.mark.parametrize("columns", [0.4, "whole"])


def trained(base, columns, **settings):
    model = sparsify(fresh(base), SparseConfig(**SETTINGS | {"columns": columns} | settings))
    train(model)
    return model


@COLUMN_SETTINGS
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_base_with_the_adapter_gives_the_same_logits(bases, tmp_path, family, columns):
    model = trained(bases[family], columns)
    save_adapter(model, tmp_path)
    loaded = load_adapter(fresh(bases[family]), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(fresh(bases[family])))
    for one in (model, loaded):
        train(one.train(), steps=2)
    assert torch.equal(logits(loaded), logits(model))


@COLUMN_SETTINGS
def test_the_positions_are_drawn_from_the_file_alone(bases, tmp_path, columns):
    model = trained(bases["gpt2"], columns)
    save_adapter(model, tmp_path)
    assert not (tmp_path / POSITIONS_NAME).exists()
    adapter = read_adapter(tmp_path)
    for name, weight in model.sparsity.weights.items():
        assert torch.equal(adapter.positions(name), weight.flat_positions())
    entry = json.loads((tmp_path / CONFIG_NAME).read_text())["tensors"]["transformer.h.0.attn.c_attn.weight"]
    assert entry["rule"] == COLUMNS
    assert entry["columns"].keys() == {"group", "count", "axis"}
    assert (entry["columns"]["group"], entry["columns"]["axis"]) == ("transformer.h.0.attn", -2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": None}, "columns are given for the rule columns-v1"),
        ({"rule": "stratified-v1"}, "columns are given for the rule columns-v1"),
        ({"columns": {"group": "a", "count": 0, "axis": -1}}, "greater than or equal to 1"),
        ({"columns": {"group": "a", "count": 999, "axis": -1}}, "999 columns of it"),
        ({"columns": {"group": "a", "count": 1, "axis": -1}}, "scalars in columns that have"),
        ({"columns": {"group": "a", "count": 8, "axis": 0}}, "axis"),
        ({"columns": {"count": 8}}, "group"),
    ],
)
def test_impossible_columns_are_refused(bases, tmp_path, change, message):
    save_adapter(trained(bases["llama"], 0.4), tmp_path)
    edit_config(tmp_path, lambda config: next(iter(config["tensors"].values())).update(change))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("change", [{"group": "model.layers.1.self_attn"}, {"count": 9}])
def test_other_columns_than_those_of_the_training_are_refused(bases, tmp_path, change):
    save_adapter(trained(bases["llama"], 0.4), tmp_path)
    edit_config(tmp_path, lambda config: next(iter(config["tensors"].values()))["columns"].update(change))
    assert "differ from those it was trained with" in refusal(fresh(bases["llama"]), tmp_path)


@COLUMN_SETTINGS
def test_a_state_dict_does_not_load_at_other_columns(bases, columns):
    model = trained(bases["llama"], columns)
    twin = sparsify(fresh(bases["llama"]), SparseConfig(**SETTINGS, columns=columns))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    other = sparsify(fresh(bases["llama"]), SparseConfig(**SETTINGS, columns=columns, seed=5))
    with pytest.raises(RuntimeError):
        other.load_state_dict(model.state_dict())


@COLUMN_SETTINGS
def test_combining_inspecting_and_merging(bases, tmp_path, columns):
    for seed, name in ((0, "one"), (0, "two"), (1, "three")):
        model = trained(bases["llama"], columns, seed=seed)
        save_adapter(model, tmp_path / name)
    facts = describe(tmp_path / "one")
    assert facts["selection"] == f"columns-v1; density: 0.08, columns: {columns}; seed 0"
    assert f"density: 0.08, columns: {columns}" in (tmp_path / "one" / "README.md").read_text()
    alike = combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "alike")
    assert {entry.rule for entry in alike.config.tensors.values()} == {COLUMNS}
    mixed = combine_adapters([tmp_path / "one", tmp_path / "three"], tmp_path / "mixed", [0.5, 0.5])
    assert {entry.rule for entry in mixed.config.tensors.values()} == {"stored"}
    base = dict(fresh(bases["llama"]).named_parameters())
    for out, parts in (("alike", ("one", "two")), ("mixed", ("one", "three"))):
        found = load_adapter(fresh(bases["llama"]), tmp_path / out)
        changes = [dict(load_adapter(fresh(bases["llama"]), tmp_path / part).named_parameters()) for part in parts]
        for name in found.sparsity.weights:
            expected = sum(change[name].detach() - base[name].detach() for change in changes) / 2
            torch.testing.assert_close(found.get_parameter(name).detach() - base[name], expected, rtol=0, atol=1e-6)
    write_merged(tmp_path / "one", tmp_path / "merged")
    expected = logits(load_adapter(fresh(bases["llama"]), tmp_path / "one"))
    torch.testing.assert_close(logits(fresh(tmp_path / "merged")), expected)


@COLUMN_SETTINGS
def test_switching_between_rules(bases, tmp_path, columns):
    save_adapter(trained(bases["llama"], columns), tmp_path / "columns")
    save_adapter(trained(bases["llama"], 1), tmp_path / "scattered")
    model = load_adapter(fresh(bases["llama"]), tmp_path / "columns", adapter_name="columns")
    one = logits(model)
    load_adapter(model, tmp_path / "scattered", adapter_name="scattered")
    set_adapter(model, "scattered")
    other = logits(model)
    assert torch.equal(other, logits(load_adapter(fresh(bases["llama"]), tmp_path / "scattered")))
    set_adapter(model, "columns")
    assert torch.equal(logits(model), one)
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(fresh(bases["llama"])))
    assert torch.equal(logits(unload(model)), logits(fresh(bases["llama"])))


@COLUMN_SETTINGS
def test_converting_to_a_format_of_scattered_scalars_and_back(bases, tmp_path, columns):
    """SHiRA stores a sparse matrix of each weight."""
    save_adapter(trained(bases["llama"], columns, rank_equivalent=2, density=None), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "shira", to="shira")
    convert(tmp_path / "shira", tmp_path / "back")
    one, other = (load_adapter(fresh(bases["llama"]), tmp_path / name) for name in ("ours", "back"))
    torch.testing.assert_close(logits(other), logits(one), rtol=0, atol=1e-6)


@COLUMN_SETTINGS
def test_a_checkpoint_exports_the_adapter(bases, tmp_path, columns):
    """See also tests/unit/training/test_resume_exact.py."""
    model = trained(bases["llama"], columns)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_steps=1)
    ids = torch.randint(3, 90, (8, 6)).tolist()
    trainer = SparseTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    export(tmp_path / "checkpoint-1", tmp_path / "adapter")
    exported = load_adapter(fresh(bases["llama"]), tmp_path / "adapter")
    assert torch.equal(logits(exported), logits(model))
    assert read_adapter(tmp_path / "adapter").stored_positions == {}
