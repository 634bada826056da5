"""Saving the adapter of a model, loading it on the base model, and merging."""

import copy
import shutil

import pytest
import torch
from adapter_cases import (
    A_DELTA,
    FAMILIES,
    LABELS,
    SPARSE,
    edit_config,
    fresh,
    logits,
    refusal,
    task_of,
    train,
    trained,
)
from families import TASKS, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import apply_selection, sparsify
from sparse_zero.selection import draws
from sparse_zero.selection.config import SparseConfig

# Save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_base_with_the_adapter_gives_the_same_logits(bases, tmp_path, family, dtype):
    model = trained(bases[family], dtype=dtype)
    save_adapter(model, tmp_path)
    base = fresh(bases[family], dtype=dtype)
    before = logits(base)
    loaded = load_adapter(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), before)
    assert loaded.sparsity.trainable_parameters == model.sparsity.trainable_parameters
    assert loaded.sparsity.base_model == str(bases[family])


def test_a_loaded_adapter_trains_on(bases, tmp_path):
    model = trained(bases["bert"])
    save_adapter(model, tmp_path)
    loaded = load_adapter(fresh(bases["bert"]), tmp_path)
    for one in (model, loaded):
        train(one.train(), steps=2)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("already_trained", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_sparsified_alike_takes_the_values(bases, tmp_path, family, already_trained):
    model = trained(bases[family])
    save_adapter(model, tmp_path)
    train(model)
    other = model if already_trained else sparsify(fresh(bases[family]), SPARSE)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(load_adapter(fresh(bases[family]), tmp_path)))


def test_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = sparsify(copy.deepcopy(base), SparseConfig(density=0.1, targets="all-linear"))
    for weight in model.sparsity.weights.values():
        nn.init.normal_(weight.delta)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(torch.ones(1, 8)), model(torch.ones(1, 8)))
    with pytest.raises(UserError, match="does not say which base model to load"):
        write_merged(tmp_path, tmp_path / "merged")


class Wrapper(nn.Module):
    """A wrapper with the model as its attribute `module`, like DistributedDataParallel and DeepSpeed's engine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models(bases, tmp_path):
    model = trained(bases["bert"])
    save_adapter(Wrapper(Wrapper(model)), tmp_path)
    other = fresh(bases["bert"])
    load_adapter(Wrapper(other), tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_saving_leaves_the_model_as_it_is(bases, tmp_path):
    model = trained(bases["bert"])
    twin = copy.deepcopy(model)
    save_adapter(model, tmp_path)
    for one in (model, twin):
        train(one)
    assert torch.equal(logits(model), logits(twin))


def test_only_the_main_process_writes(bases, tmp_path):
    save_adapter(trained(bases["bert"]), tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_is_not_sparse(bases, tmp_path):
    with pytest.raises(UserError, match="BertForSequenceClassification is not sparse"):
        save_adapter(fresh(bases["bert"]), tmp_path)


# Merge


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_directory_is_a_plain_model_with_the_same_logits(bases, tmp_path, family):
    model = trained(bases[family])
    save_adapter(model, tmp_path / "adapter")
    facts = write_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = TASKS[task_of(bases[family])].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
    assert type(merged) is type(fresh(bases[family]))
    assert facts["class"] == type(merged).__name__
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("some text").input_ids
    assert not [path for path in (tmp_path / "merged").iterdir() if path.name.startswith("adapter")]


def test_a_merged_classifier_keeps_its_labels_and_its_padding(adapter, tmp_path):
    write_merged(adapter, tmp_path / "merged")
    merged = TASKS["sequence-classification"].from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == LABELS
    assert merged.config.label2id == {label: key for key, label in LABELS.items()}
    assert merged.config.pad_token_id == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_the_selected_scalars_only(bases, tmp_path, family, dtype):
    # To compare bits in bfloat16, the base must be saved in bfloat16
    base = tmp_path / family
    shutil.copytree(bases[family], base)
    stored = AutoModel if family == "bert" else TASKS["causal-lm"]
    stored.from_pretrained(bases[family], dtype=dtype).save_pretrained(base)
    model = trained(base, dtype=dtype)
    save_adapter(model, tmp_path / "adapter")
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    prefix = "bert." if family == "bert" else ""
    before = {prefix + name: tensor for name, tensor in before.items()}
    assert set(after) == set(before) | set(model.sparsity.whole)
    for name, weight in model.sparsity.weights.items():
        flat = draws.stratified_positions(SPARSE.seed, name, before[name].numel(), weight.delta.numel())
        assert (before[name].view(-1)[flat] != after[name].view(-1)[flat]).float().mean() > 0.9
        before[name].view(-1)[flat] = after[name].view(-1)[flat] = 0
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_merging_never_overwrites_a_file_or_the_base_model(bases, adapter, tmp_path):
    (tmp_path / "file").touch()
    before = (bases["bert"] / "model.safetensors").read_bytes()
    for out, expected in ((tmp_path / "file", "is a file"), (bases["bert"], "is the base model")):
        with pytest.raises(UserError, match=expected):
            write_merged(adapter, out)
    assert (bases["bert"] / "model.safetensors").read_bytes() == before


def test_a_base_model_that_is_not_there(adapter, tmp_path):
    edit_config(adapter, lambda config: config.update(base_model_name_or_path=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"gone cannot be loaded"):
        write_merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# Adapters that do not fit: the error comes before any change of the model


def test_a_model_without_a_name_of_the_adapter(bases, adapter):
    message = refusal(fresh(bases["llama"]), adapter)
    assert f"trained on {bases['bert']}, does not fit LlamaForCausalLM: the model has no parameter 'bert." in message


def test_a_model_of_another_shape(adapter):
    wider = tiny("bert", "sequence-classification", hidden_size=32, num_labels=3)
    assert f"'{A_DELTA}' has shape [32, 32] in the model and [16, 16] in the adapter" in refusal(wider, adapter)


def test_a_head_of_another_shape(bases, adapter):
    model = fresh(bases["bert"], id2label={0: "one"}, label2id={"one": 0})
    assert "'classifier.weight' has shape [1, 16] in the model and [3, 16] in the adapter" in refusal(model, adapter)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 12}, {"density": 0.05}, {"targets": ["attention.self.query"]}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_model_sparsified_differently(bases, adapter, settings):
    model = sparsify(fresh(bases["bert"]), SPARSE.model_copy(update=settings))
    assert "the model has a different selection" in refusal(model, adapter)


def test_a_model_sparsified_without_the_head(bases, adapter):
    selections = [tensor.selection(name) for name, tensor in read_config(adapter).tensors.items()]
    model = apply_selection(fresh(bases["bert"]), SPARSE, selections, whole=[])
    assert "different selection (seed, density, targets or modules_to_save)" in refusal(model, adapter)


# The base model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_model_of_the_same_shapes_is_refused(bases, adapter, dtype):
    other = fresh(bases["bert"])
    with torch.no_grad():
        # Like a revision with a little more training
        other.bert.encoder.layer[1].intermediate.dense.weight.mul_(1.01)
    message = refusal(other.to(dtype), adapter)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert (
        f"trained on {bases['bert']}, but this model has different weights: '{name}'; load the base model" in message
    )


def test_the_revision_is_named_where_it_is_known(bases, adapter):
    edit_config(adapter, lambda config: config.update(revision="v1.0"))
    edit_config(
        adapter, lambda config: [config["base_fingerprint"].update({n: "0" * 8}) for n in config["base_fingerprint"]]
    )
    assert f"trained on {bases['bert']} at revision v1.0" in refusal(fresh(bases["bert"]), adapter)


def test_a_base_in_bfloat16_is_the_same_base(bases, adapter):
    load_adapter(fresh(bases["bert"], dtype=torch.bfloat16), adapter)


def test_a_base_in_float16_cannot_be_checked(bases, adapter, caplog):
    load_adapter(fresh(bases["bert"], dtype=torch.float16), adapter)
    assert "not checked against the base model's weights" in caplog.text


def test_training_does_not_make_it_another_base(bases, adapter):
    # The weights contain the deltas, and the head has changed
    model = load_adapter(fresh(bases["bert"]), adapter)
    train(model)
    load_adapter(model, adapter)
