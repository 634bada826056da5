"""Converting a fine-tuned model to an adapter."""

import json
import subprocess
import sys

import pytest
import torch
from families import VOCABULARY
from format_cases import CAUSAL, CLASSIFIER, TASKS, logits, open_base, save_base, tokens
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

from sparse_zero import SparseConfig, UserError, load_adapter, merge_and_unload, save_adapter, sparsify
from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.merging import write_merged


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {task: save_base(root / task, "llama", task) for task in (CAUSAL, CLASSIFIER)} | {
        "bert": save_base(root / "bert", "bert", CLASSIFIER)
    }


def shift(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def sparsely_tuned(base, out, task=CAUSAL, dtype=torch.float32, shard="5GB", **settings):
    """Write a model in which some scalars differ from the base. Returns: their positions."""
    model = sparsify(open_base(base, task, dtype), SparseConfig(**{"density": 0.03} | settings))
    shift(model)
    positions = {name: weight.flat_positions() for name, weight in model.sparsity.weights.items()}
    merge_and_unload(model).save_pretrained(out, max_shard_size=shard)
    return positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_the_changes_and_nothing_else(bases, tmp_path, dtype, shard):
    open_base(bases[CAUSAL], CAUSAL, dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
    positions = sparsely_tuned(tmp_path / "base", tmp_path / "tuned", dtype=dtype, shard=shard)
    assert (len(list((tmp_path / "tuned").glob("model-*.safetensors"))) > 1) == (shard == "4KB")
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(tmp_path / "base"))
    assert facts["notes"] == []
    adapter = read_adapter(tmp_path / "ours")
    assert adapter.deltas.keys() == positions.keys()
    for name, flat in positions.items():
        # Changes that round to zero in bfloat16 do not count
        assert torch.isin(adapter.positions(name), flat).all()
        assert adapter.positions(name).numel() > 0.95 * flat.numel()
    model = merge_and_unload(load_adapter(open_base(tmp_path / "base", CAUSAL, dtype), tmp_path / "ours"))
    tuned = dict(open_base(tmp_path / "tuned", CAUSAL, dtype).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tuned[name]), name


def test_to_peft(bases, tmp_path):
    sparsely_tuned(bases[CAUSAL], tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "peft", to="shira", base=str(bases[CAUSAL]))
    theirs = PeftModel.from_pretrained(open_base(bases[CAUSAL], CAUSAL), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(open_base(tmp_path / "tuned", CAUSAL)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_new_head_is_kept_whole(bases, tmp_path, family):
    """The base is a language model, or an encoder whose weights are saved without a prefix."""
    if family == "llama":
        original, tuned = bases[CAUSAL], TASKS[CLASSIFIER].from_pretrained(bases[CAUSAL], num_labels=3)
    else:
        original = tmp_path / "encoder"
        open_base(bases["bert"], CLASSIFIER).bert.save_pretrained(original)
        assert "embeddings.word_embeddings.weight" in load_file(original / "model.safetensors")
        tuned = TASKS[CLASSIFIER].from_pretrained(original, num_labels=3)
    tuned = sparsify(tuned, SparseConfig(density=0.04))
    shift(tuned)
    merge_and_unload(tuned).save_pretrained(tmp_path / "tuned")
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(original))
    head = "score.weight" if family == "llama" else "classifier.weight"
    assert f"'{head}' is saved fully: the base model does not have it" in facts["notes"]
    assert not any("whole model was loaded" in note for note in facts["notes"])
    model = TASKS[CLASSIFIER].from_pretrained(original, num_labels=3)
    load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(open_base(tmp_path / "tuned", CLASSIFIER)), rtol=0, atol=1e-6)


def test_one_dense_weight_is_kept_whole(bases, tmp_path):
    model = open_base(bases[CAUSAL], CAUSAL)
    norm, sparse = model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        norm.add_(0.5)
        sparse[2, 3] += 1
    model.save_pretrained(tmp_path / "tuned")
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]))
    assert facts["notes"] == ["'model.norm.weight' is saved fully: 100% of its scalars differ"]
    adapter = read_adapter(tmp_path / "ours")
    assert list(adapter.whole) == ["model.norm.weight"]
    assert {name: adapter.positions(name).tolist() for name in adapter.deltas} == {
        "model.layers.0.mlp.up_proj.weight": [2 * 16 + 3]
    }
    opened = load_adapter(open_base(bases[CAUSAL], CAUSAL), tmp_path / "ours")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


def test_a_layer_of_which_a_part_is_kept_whole(bases, tmp_path):
    """PEFT saves whole modules: the other parameters of such a module are those of the base model."""
    model = open_base(bases["bert"], CLASSIFIER)
    layer = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        layer.output.LayerNorm.weight.add_(0.5)
        layer.self.value.weight[3, 4] += 5
    model.save_pretrained(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "peft", to="supertuning", base=str(bases["bert"]))
    theirs = PeftModel.from_pretrained(open_base(bases["bert"], CLASSIFIER), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)

    with torch.no_grad():
        layer.self.value.bias.add_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"self.value.weight' is in a fully trained module"):
        convert(tmp_path / "tuned", tmp_path / "other", to="supertuning", base=str(bases["bert"]))


def test_other_models_and_their_buffers(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 4)[1, 2, 0, 1] += 1
    model.save_pretrained(tmp_path / "tuned")
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(tmp_path / "base"))
    assert (facts["task"], facts["selected_scalars"]) == (None, 1)
    opened = ResNetForImageClassification.from_pretrained(tmp_path / "base").eval()
    load_adapter(opened, tmp_path / "ours")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(opened(images).logits, model(images).logits, rtol=0, atol=1e-6)

    next(buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")).add_(1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"the buffer '.*running_mean' differs"):
        convert(tmp_path / "tuned", tmp_path / "other", base=str(tmp_path / "base"))


def test_a_model_tuned_densely_is_refused_unless_asked_for(bases, tmp_path):
    model = open_base(bases[CAUSAL], CAUSAL)
    shift(model)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"100% of its scalars differ from .* more than 50%.*--max-density 1"):
        convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]))
    convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]), max_density=1.0)
    opened = load_adapter(open_base(bases[CAUSAL], CAUSAL), tmp_path / "ours")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=0)


def test_new_tokens(bases, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bases[CAUSAL])
    tokenizer.add_tokens(["<a>", "<b>"])
    model = open_base(bases[CAUSAL], CAUSAL)
    model.resize_token_embeddings(VOCABULARY + 2)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 7] += 1
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]))
    config = read_adapter(tmp_path / "ours").config
    assert config.new_tokens == ["<a>", "<b>"]
    assert config.tensors["model.embed_tokens.weight"].whole_rows == [VOCABULARY, VOCABULARY + 1]
    write_merged(tmp_path / "ours", tmp_path / "merged")
    merged = open_base(tmp_path / "merged", CAUSAL)
    batch = tokens(vocabulary=VOCABULARY + 2)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch).logits, model.eval()(batch).logits, rtol=0, atol=1e-6)


def test_tied_embeddings(tmp_path):
    base = save_base(tmp_path / "base", "llama", CAUSAL, tie_word_embeddings=True)
    sparsely_tuned(base, tmp_path / "tuned", targets=["embed_tokens"])
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(base))
    assert facts["weights"] == 1
    opened = load_adapter(open_base(base, CAUSAL), tmp_path / "ours")
    torch.testing.assert_close(logits(opened), logits(open_base(tmp_path / "tuned", CAUSAL)), rtol=0, atol=1e-6)


def test_a_model_of_which_only_the_head_is_new(bases, tmp_path):
    tuned = TASKS[CLASSIFIER].from_pretrained(bases[CAUSAL], num_labels=3)
    tuned.save_pretrained(tmp_path / "tuned")
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]))
    assert (facts["weights"], facts["whole_scalars"]) == (0, 48)
    model = TASKS[CLASSIFIER].from_pretrained(bases[CAUSAL], num_labels=3)
    load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(tuned), rtol=0, atol=0)
    save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").config.dtype == "float32"
    with pytest.raises(UserError, match="no weight has selected scalars, but PEFT SHiRA needs at least one"):
        convert(tmp_path / "ours", tmp_path / "peft", to="shira")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one(tmp_path, family):
    settings = {} if family == "mixtral" else {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    base = save_base(tmp_path / "base", family, CAUSAL, **settings)
    assert any(".experts.1." in name for name in load_file(base / "model.safetensors"))
    positions = sparsely_tuned(base, tmp_path / "tuned", targets=["experts.down_proj"])
    facts = convert(tmp_path / "tuned", tmp_path / "ours", base=str(base))
    assert "whole model was loaded" in facts["notes"][0]
    adapter = read_adapter(tmp_path / "ours")
    assert {name: adapter.positions(name).tolist() for name in adapter.deltas} == {
        name: flat.tolist() for name, flat in positions.items()
    }
    opened = load_adapter(open_base(base, CAUSAL), tmp_path / "ours")
    torch.testing.assert_close(logits(opened), logits(open_base(tmp_path / "tuned", CAUSAL)), rtol=0, atol=1e-6)


def test_memory_is_bounded(tmp_path):
    """Two models of 170 MB in shards: the process needs less memory than one of them."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    size = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "base", max_shard_size="50MB")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[::7, ::11] += 0.01
    model.save_pretrained(tmp_path / "tuned", max_shard_size="50MB")
    del model
    # Anonymous memory only: how much of the mapped files stays in memory is up to the kernel
    script = (
        "import re, sys, threading, time\n"
        "from pathlib import Path\n"
        "from sparse_zero.adapters.formats import model_weights\n"
        "from sparse_zero.adapters.formats.convert import convert\n"
        "def used():\n"
        "    return int(re.search(r'RssAnon:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "def watch():\n"
        "    while running:\n"
        "        peaks.append(used())\n"
        "        time.sleep(0.001)\n"
        "model_weights.CHUNK_BYTES = 2**22\n"
        "peaks, running = [used()], True\n"
        "watcher = threading.Thread(target=watch)\n"
        "watcher.start()\n"
        "convert(sys.argv[1], sys.argv[3], base=sys.argv[2])\n"
        "running = False\n"
        "watcher.join()\n"
        "print(max(peaks) - peaks[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "tuned", tmp_path / "base", tmp_path / "ours"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1024 * int(done.stdout.split()[-1]) < 0.2 * size
    adapter = read_adapter(tmp_path / "ours")
    assert list(adapter.deltas) == ["model.layers.1.mlp.up_proj.weight"]
    (shape,) = {adapter.selection(name).shape for name in adapter.deltas}
    changed = torch.zeros(shape)
    changed[::7, ::11] = 1
    assert torch.equal(adapter.positions("model.layers.1.mlp.up_proj.weight"), changed.flatten().nonzero().squeeze(1))


# Damaged or wrong input


def test_bad_input(bases, tmp_path):
    sparsely_tuned(bases[CAUSAL], tmp_path / "tuned")
    base = str(bases[CAUSAL])

    def refusal(source="tuned", base=base):
        with pytest.raises(UserError) as refused:
            convert(tmp_path / source, tmp_path / "ours", base=base)
        assert not (tmp_path / "ours").exists()
        return str(refused.value)

    assert "is a model, not an adapter; pass the model that was fine-tuned with --base" in refusal(base=None)
    assert "has the same weights as" in refusal(base=str(tmp_path / "tuned"))
    wider = save_base(tmp_path / "wider", "llama", CAUSAL, hidden_size=24, head_dim=12)
    message = refusal(base=str(wider))
    assert "'model.embed_tokens.weight' has shape [96, 16], but [96, 24]" in message
    assert "pass the model that was fine-tuned with --base" in message
    assert "neither model.safetensors nor" in refusal(base=str(tmp_path))

    path = tmp_path / "tuned" / "model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(content[:-9])
    assert f"{path}: damaged" in refusal()
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    assert "damaged: has no weights for 'model.norm.weight'" in refusal()
    path.write_bytes(content)
    config = tmp_path / "tuned" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"architectures": ["OwnModel"]}))
    assert "(OwnModel) is unknown to transformers" in refusal()
    config.write_text(json.dumps(settings | {"model_type": "own"}))
    assert f"{tmp_path / 'tuned'} cannot be loaded: The checkpoint" in refusal()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_numbers_of_a_training(bases, tmp_path, dtype):
    sparsely_tuned(bases[CAUSAL], tmp_path / "tuned")
    path, name = tmp_path / "tuned" / "model.safetensors", "model.norm.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"tuned: the values of '{name}' are {dtype}; they can be float32"):
        convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]))


@pytest.mark.parametrize("file", ["../base/model.safetensors", "/etc/passwd", 1, None, "gone.safetensors", "a\0b"])
def test_an_index_that_names_other_files(bases, tmp_path, file):
    sparsely_tuned(bases[CAUSAL], tmp_path / "tuned", shard="10kB")
    path = tmp_path / "tuned" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(UserError):
        convert(tmp_path / "tuned", tmp_path / "ours", base=str(bases[CAUSAL]))
