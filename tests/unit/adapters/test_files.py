"""The files of an adapter directory, intact and damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from adapter_cases import A_DELTA, FAMILIES, LABELS, SPARSE, edit_config, fresh, logits, refusal, trained
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_zero.adapters.files import adapter_bytes, read_config
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.save_and_load import save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection import draws
from sparse_zero.selection.config import SparseConfig


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# Valid files


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_hold_the_trained_values_and_nothing_else(bases, tmp_path, family):
    model = trained(bases[family])
    save_adapter(model, tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == files
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == set(model.sparsity.weights) | set(model.sparsity.whole)
    base = dict(fresh(bases[family]).named_parameters())
    logits(model)
    for name in model.sparsity.weights:
        values, expected = tensors[name], base[name].detach().clone()
        flat = draws.stratified_positions(SPARSE.seed, name, expected.numel(), values.numel())
        expected.view(-1)[flat] += values
        assert torch.equal(model.get_parameter(name), expected)
    for name in model.sparsity.whole:
        assert torch.equal(model.get_parameter(name), tensors[name])


def test_the_config_tells_what_was_trained(bases, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases["bert"])
    assert config["task"] == "sequence-classification"
    assert {key: value for key, value in config["sparse"].items() if value is not None} == {
        **{"density": 0.04, "seed": 11, "selection": "stratified", "granularity": 1, "dropout": 0.0},
        **{"indices": "stored", "transient_mib": 64, "columns": 1, "selection_examples": 64},
    }
    drawn = config["tensors"][A_DELTA]
    assert (drawn["rule"], drawn["seed"], drawn["granularity"]) == ("stratified-v1", 11, 1)
    assert set(config["base_fingerprint"]) == {
        name for name, _ in fresh(bases["bert"]).named_parameters() if not name.startswith("classifier")
    }
    assert config["modules_to_save"] == ["classifier.weight", "classifier.bias"]
    assert config["model_settings"]["id2label"] == {str(key): label for key, label in LABELS.items()}
    assert config["tensors"][A_DELTA]["shape"] == [16, 16]
    assert config["trainable_parameters"] == round(0.04 * config["total_parameters"])
    assert config["dtype"] == "float32"


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 4.1), (torch.bfloat16, 2.1)])
def test_bytes_per_trained_scalar(tmp_path, dtype, limit):
    # DeepSpeed casts the model, deltas included
    model = sparsify(
        nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))), SparseConfig(density=0.1, targets="all-linear")
    )
    save_adapter(model.to(dtype), tmp_path)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert adapter_bytes(tmp_path) == on_disk - (tmp_path / "README.md").stat().st_size
    assert on_disk <= limit * model.sparsity.trainable_parameters


def test_describe(bases, adapter):
    facts = describe(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert facts["base_model"] == str(bases["bert"])
    assert facts["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["bytes"] == adapter_bytes(adapter)
    found = {entry["name"]: entry for entry in facts["tensors"]}
    assert found.keys() == tensors.keys()
    assert found[A_DELTA]["trained"] == "selected"
    assert found[A_DELTA]["shape"] == [16, 16]
    assert found[A_DELTA]["norm"] == pytest.approx(tensors[A_DELTA].norm().item())
    assert found["classifier.weight"]["trained"] == "whole"
    assert found["classifier.weight"]["shape"] == [3, 16]
    json.dumps(facts)


# Damaged files: the error comes before any change of the model


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: shutil.rmtree(d), "no such adapter directory"),
        (lambda d: (d / "adapter_config.json").unlink(), "not an adapter directory (it has no adapter_config.json)"),
        (lambda d: (d / "adapter_config.json").write_text('{"adapter_type": '), "adapter_config.json: damaged"),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\x00"), "adapter_config.json: damaged"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (lambda d: edit_config(d, lambda c: c.update(adapter_type="lora")), "not a sparse-zero adapter"),
        (lambda d: edit_config(d, lambda c: c.update(format_version=2)), "format 2 is newer than 1"),
        (lambda d: edit_config(d, lambda c: c.update(format_version="?")), "format_version: Input should be"),
        (lambda d: edit_config(d, lambda c: c.pop("tensors")), "tensors: Field required"),
        (lambda d: edit_config(d, lambda c: c.update(surprise=1)), "surprise: Extra inputs"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
        (lambda d: edit_config(d, lambda c: c["modules_to_save"].pop()), "'classifier.bias' is in only one of"),
        (lambda d: edit_config(d, lambda c: c["tensors"].pop(A_DELTA)), f"'{A_DELTA}' is in only one of"),
        (
            lambda d: edit_config(d, lambda c: c["tensors"][A_DELTA].update(count=3)),
            "instead of [3], which adapter_config.json requires",
        ),
        (
            lambda d: edit_config(d, lambda c: c["tensors"][A_DELTA].update(rule="shuffled-v9")),
            f"tensors.{A_DELTA}.rule: Input should be 'stratified-v1', 'bernoulli-v1', 'columns-v1' or 'stored'",
        ),
        (lambda d: flip(d / "adapter_model.safetensors", -3), "adapter_model.safetensors: damaged"),
        (lambda d: flip(d / "adapter_model.safetensors", 12), "adapter_model.safetensors: damaged"),
        (
            lambda d: edit_config(d, lambda c: c["base_fingerprint"].update({A_DELTA: "0" * 8})),
            f"but this model has different weights: '{A_DELTA}'; load the base model",
        ),
    ],
    ids=[
        *("no-directory", "no-config", "cut-json", "binary-json", "not-a-mapping", "another-kind", "newer"),
        *("odd-version", "missing-key", "extra-key", "no-values", "unlisted-parameter", "unlisted-weight"),
        *("other-count", "other-rule", "flipped-value", "flipped-header", "other-base"),
    ],
)
def test_a_damaged_adapter(bases, adapter, damage, expected, sparse):
    damage(adapter)
    model = fresh(bases["bert"])
    assert expected in refusal(sparsify(model, SPARSE) if sparse else model, adapter)


@pytest.mark.parametrize("edit", [{"positions": "0" * 16}, {"seed": 12}])
def test_positions_that_are_drawn_differently(bases, adapter, edit):
    edit_config(adapter, lambda config: config["tensors"][A_DELTA].update(edit))
    message = refusal(fresh(bases["bert"]), adapter)
    assert f"the positions of '{A_DELTA}' differ from those it was trained with" in message


@pytest.mark.parametrize("at", [0, 7, 30, 0.3, 0.6, -1])
def test_every_flipped_bit_of_the_values_is_noticed(bases, adapter, at):
    path = adapter / "adapter_model.safetensors"
    flip(path, int(at * path.stat().st_size) if isinstance(at, float) else at)
    assert "adapter_model.safetensors: damaged" in refusal(fresh(bases["bert"]), adapter)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(bases, adapter, kept):
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "adapter_model.safetensors: damaged" in refusal(fresh(bases["bert"]), adapter)
    with pytest.raises(UserError, match="damaged"):
        describe(adapter)


def test_values_of_another_shape(bases, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[A_DELTA] = tensors[A_DELTA][:1]
    save_file(tensors, adapter / "adapter_model.safetensors")
    checksum = xxhash.xxh3_128((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert "from a different save than adapter_config.json" in refusal(fresh(bases["bert"]), adapter)
    edit_config(adapter, lambda config: config["files"].update({"adapter_model.safetensors": checksum}))
    assert f"'{A_DELTA}' has the shape [1]" in refusal(fresh(bases["bert"]), adapter)


def test_read_config_gives_back_what_was_saved(adapter):
    config = read_config(adapter)
    assert config.sparse == SPARSE
    assert config.modules_to_save == ["classifier.weight", "classifier.bias"]


def test_a_training_is_saved_whatever_the_models_config_contains(bases, tmp_path, caplog):
    model = trained(bases["llama"])
    model.config.pad_token_id, model.config.problem_type = -100, "my own"
    model.sparsity.results = {"accuracy": 0.5, "rows": [1, 2]}
    save_adapter(model, tmp_path)
    assert "does not contain problem_type, pad_token_id of the model's config" in caplog.text
    config = read_config(tmp_path)
    assert set(config.model_settings) == {"id2label", "label2id"}
    assert config.results == {"accuracy": 0.5}
