import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
import yaml
from families import TASKS, VOCABULARY, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from sparse_zero.adapters.files import adapter_bytes, read_config
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter, write_merged
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import attach, sparsify
from sparse_zero.selection import rules
from sparse_zero.selection.config import SparseConfig

FAMILIES = ["bert", "gpt2", "llama"]
LABELS = {0: "bad", 1: "good", 2: "neither"}
TOKENS = torch.arange(3, 3 + 28).view(4, 7) % VOCABULARY
SPARSE = SparseConfig(density=0.04, seed=11)
A_DELTA = "bert.encoder.layer.0.attention.self.value.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer_dir) -> dict[str, Path]:
    """A directory with a tiny random model and a tokenizer for each family; BERT's without a head."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        shutil.copytree(tokenizer_dir, found[family], dirs_exist_ok=True)
        model = tiny(family, "sequence-classification" if family == "bert" else "causal-lm")
        (model.base_model if family == "bert" else model).save_pretrained(found[family])
    return found


def task_of(base: Path) -> str:
    return "sequence-classification" if base.name.startswith("bert") else "causal-lm"


def fresh(base: Path, **settings) -> PreTrainedModel:
    """The base model; a head that it has not is drawn anew each time."""
    task = task_of(base)
    if task == "sequence-classification":
        settings = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, "pad_token_id": 5} | settings
    return TASKS[task].from_pretrained(base, **settings)


def train(model: PreTrainedModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    labels = TOKENS[:, 0] % 2 if type(model).__name__.endswith("Classification") else TOKENS
    for _ in range(steps):
        model(input_ids=TOKENS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(base: Path, **settings) -> PreTrainedModel:
    model = sparsify(fresh(base, **settings), SPARSE)
    train(model)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture
def adapter(bases, tmp_path) -> Path:
    """An adapter of the BERT classifier."""
    save_adapter(trained(bases["bert"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(directory: Path, edit: Callable[[dict], object]) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def refusal(model: nn.Module, directory: Path) -> str:
    """Why an adapter is refused; the model must come out of it as it went in."""

    def snapshot() -> list:
        kinds = [type(module) for module in model.modules()]
        return [kinds, [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]]

    before, weights = snapshot(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_adapter(model, directory)
    assert snapshot() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert str(directory) in str(error.value)
    return str(error.value)


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
    with pytest.raises(UserError, match="made in a program of your own"):
        write_merged(tmp_path, tmp_path / "merged")


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel and DeepSpeed's engine do."""

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


# The files


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
        flat = rules.positions(SPARSE.seed, name, expected.numel(), values.numel())
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
        **{"indices": "stored", "transient_mib": 64},
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
    # Deltas have the weights' dtype where ZeRO holds their float32 originals.
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
    # In bfloat16 the base must be a bfloat16 file for its bits to be comparable.
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
        flat = rules.positions(SPARSE.seed, name, before[name].numel(), weight.delta.numel())
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
    with pytest.raises(UserError, match=r"gone cannot be loaded for sequence-classification"):
        write_merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# What is refused, before anything in the model is touched


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: shutil.rmtree(d), "not an adapter directory (adapter_config.json is not there)"),
        (lambda d: (d / "adapter_config.json").unlink(), "not an adapter directory"),
        (lambda d: (d / "adapter_config.json").write_text('{"adapter_type": '), "adapter_config.json: cannot be read"),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\x00"), "adapter_config.json: cannot be read"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "not a sparse-zero adapter"),
        (lambda d: edit_config(d, lambda c: c.update(adapter_type="lora")), "not a sparse-zero adapter"),
        (lambda d: edit_config(d, lambda c: c.update(format_version=2)), "format 2 is newer than 1"),
        (lambda d: edit_config(d, lambda c: c.update(format_version="?")), "format_version: Input should be"),
        (lambda d: edit_config(d, lambda c: c.pop("tensors")), "tensors: Field required"),
        (lambda d: edit_config(d, lambda c: c.update(surprise=1)), "surprise: Extra inputs"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: not there"),
        (lambda d: edit_config(d, lambda c: c["modules_to_save"].pop()), "'classifier.bias' is in only one of"),
        (lambda d: edit_config(d, lambda c: c["tensors"].pop(A_DELTA)), f"'{A_DELTA}' is in only one of"),
        (
            lambda d: edit_config(d, lambda c: c["tensors"][A_DELTA].update(count=3)),
            "adapter_config.json says 3",
        ),
        (
            lambda d: edit_config(d, lambda c: c["tensors"][A_DELTA].update(rule="shuffled-v9")),
            f"tensors.{A_DELTA}.rule: Input should be 'stratified-v1', 'bernoulli-v1' or 'stored'",
        ),
        (lambda d: flip(d / "adapter_model.safetensors", -3), "adapter_model.safetensors: damaged"),
        (lambda d: flip(d / "adapter_model.safetensors", 12), "adapter_model.safetensors: damaged"),
        (
            lambda d: edit_config(d, lambda c: c["base_fingerprint"].update({A_DELTA: "0" * 8})),
            f"and this model has other weights: '{A_DELTA}'; load that base model",
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
    assert f"the positions of '{A_DELTA}' are not those that it was trained with" in message


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


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


def test_a_model_without_a_name_of_the_adapter(bases, adapter):
    message = refusal(fresh(bases["llama"]), adapter)
    assert f"made for {bases['bert']}, does not fit LlamaForCausalLM: it has no parameter 'bert." in message


def test_a_model_of_another_shape(adapter):
    wider = tiny("bert", "sequence-classification", hidden_size=32, num_labels=3)
    assert f"'{A_DELTA}' has shape [32, 32] there and [16, 16] in the adapter" in refusal(wider, adapter)


def test_a_head_of_another_shape(bases, adapter):
    model = fresh(bases["bert"], id2label={0: "one"}, label2id={"one": 0})
    assert "'classifier.weight' has shape [1, 16] there and [3, 16] in the adapter" in refusal(model, adapter)


def test_values_of_another_shape(bases, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[A_DELTA] = tensors[A_DELTA][:1]
    save_file(tensors, adapter / "adapter_model.safetensors")
    checksum = xxhash.xxh3_128((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert "from another save (its checksum" in refusal(fresh(bases["bert"]), adapter)
    edit_config(adapter, lambda config: config["files"].update({"adapter_model.safetensors": checksum}))
    assert f"'{A_DELTA}' has shape [1]" in refusal(fresh(bases["bert"]), adapter)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 12}, {"density": 0.05}, {"targets": ["attention.self.query"]}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_model_sparsified_differently(bases, adapter, settings):
    model = sparsify(fresh(bases["bert"]), SPARSE.model_copy(update=settings))
    assert "this model was sparsified differently" in refusal(model, adapter)


def test_a_model_sparsified_without_the_head(bases, adapter):
    draws = [tensor.draw(name) for name, tensor in read_config(adapter).tensors.items()]
    model = attach(fresh(bases["bert"]), SPARSE, draws, whole=[])
    assert "sparsified differently (seed, density, targets or modules_to_save)" in refusal(model, adapter)


def test_read_config_gives_back_what_was_saved(adapter):
    config = read_config(adapter)
    assert config.sparse == SPARSE
    assert config.modules_to_save == ["classifier.weight", "classifier.bias"]


# The base model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_model_of_the_same_shapes_is_refused(bases, adapter, dtype):
    other = fresh(bases["bert"])
    with torch.no_grad():
        # As a revision that was trained on a little
        other.bert.encoder.layer[1].intermediate.dense.weight.mul_(1.01)
    message = refusal(other.to(dtype), adapter)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert f"made for {bases['bert']}, and this model has other weights: '{name}'; load that base model" in message


def test_the_revision_is_named_where_it_is_known(bases, adapter):
    edit_config(adapter, lambda config: config.update(revision="v1.0"))
    edit_config(
        adapter, lambda config: [config["base_fingerprint"].update({n: "0"}) for n in config["base_fingerprint"]]
    )
    assert f"made for {bases['bert']} at revision v1.0" in refusal(fresh(bases["bert"]), adapter)


def test_a_base_in_bfloat16_is_the_same_base(bases, adapter):
    load_adapter(fresh(bases["bert"], dtype=torch.bfloat16), adapter)


def test_a_base_in_float16_cannot_be_checked(bases, adapter, caplog):
    load_adapter(fresh(bases["bert"], dtype=torch.float16), adapter)
    assert "not checked against the base model's weights" in caplog.text


def test_training_does_not_make_it_another_base(bases, adapter):
    # The weights hold the deltas, and the head is another.
    model = load_adapter(fresh(bases["bert"]), adapter)
    train(model)
    load_adapter(model, adapter)


# The model card


def test_the_model_card_tells_the_figures(bases, tmp_path):
    model = trained(bases["bert"])
    model.sparsity.base_model = "org/base"
    model.sparsity.results = {"accuracy": 0.81254, "accuracy_before": 0.5, "loss": 0.4, "eval_examples": 1000}
    save_adapter(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "sparse-zero",
        "tags": ["sparse-zero", "sparta", "adapter"],
        "base_model": "org/base",
        "pipeline_tag": "text-classification",
    }
    assert f"{model.sparsity.trainable_parameters:,} of {model.sparsity.total_parameters:,} scalars" in card
    assert "on 1,000 held-out examples" in card
    assert "| accuracy | 0.5 | 0.8125 |" in card
    assert "| loss |  | 0.4 |" in card
    assert "num_labels=3" in card
    assert read_config(tmp_path).results == model.sparsity.results


def test_the_model_card_opens_what_a_package_ships(bases, tmp_path):
    model = trained(bases["llama"])
    model.sparsity.base_model = "package://some/model"
    save_adapter(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert 'AutoModelForCausalLM.from_pretrained(package_path("package://some/model"))' in code
    assert "from sparse_zero import load_adapter, package_path" in code
