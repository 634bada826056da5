"""Models in GGUF files: read once, whatever asks, and the same values as the file has."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_cases import write_gguf
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.data import gguf as reading
from sparse_zero.data.models import load_config, load_model, load_tokenizer
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.planning.planned_run import describe_run
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.selection.config import SparseConfig

TOKENS = torch.arange(3, 59).view(4, 14)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "sparse-zero" / "gguf" / "dequantised"


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.fixture
def model(file, tokenizer_dir):
    """The model that the file has."""
    return write_gguf(file, tokenizer_dir)


def close(a, b) -> bool:
    """Equal up to the rounding of a quotient in float32."""
    return torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_the_values_are_those_of_the_file(model, file, cache, tokenizer):
    found = load_model(str(file), "causal-lm")
    assert found.dtype == torch.float32
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(close(values, expected[name]) for name, values in found.state_dict().items())
    assert torch.allclose(found(TOKENS).logits, model(TOKENS).logits, atol=1e-5)
    ours = load_tokenizer(str(file))
    text = "a fine film , but too long"
    assert ours(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert ours.chat_template == tokenizer.chat_template
    [directory] = (path for path in cache.iterdir() if path.is_dir())
    assert not hasattr(AutoModelForCausalLM.from_pretrained(directory).config, "quantization_config")


def test_it_is_read_once_and_again_after_a_change(model, file, cache, tokenizer_dir, monkeypatch):
    calls = []
    original = reading._dequantise
    monkeypatch.setattr(reading, "_dequantise", lambda *a: (calls.append(a), original(*a)))
    for _ in range(2):
        load_tokenizer(str(file))
        load_model(str(file), "causal-lm")
        load_config(str(file))
    assert len(calls) == 1
    other = write_gguf(file, tokenizer_dir, seed=1)
    assert close(load_model(str(file), "causal-lm").lm_head.weight, other.lm_head.weight)
    assert len(calls) == 2


def test_a_plan_reads_no_weights(model, file, cache):
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(file), "task": "causal-lm"},
            "data": {"path": "d", "columns": {"text": "t"}},
            "training": {"learning_rate": 1e-3},
        }
    )
    assert sum(describe_run(recipe).sizes.base) == sum(parameter.numel() for parameter in model.parameters())
    assert not any(path.is_dir() for path in cache.iterdir())


def test_processes_at_once_read_it_once(model, file, tmp_path, cache):
    code = (
        "import logging, sys; logging.basicConfig(level='WARNING', format='%(message)s')\n"
        "from sparse_zero.data.gguf import model_path\n"
        "print(model_path(sys.argv[1]))"
    )
    environment = {**os.environ, "HF_ASSETS_CACHE": str(tmp_path / "assets")}
    command = [sys.executable, "-c", code, str(file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    paths = {out.splitlines()[-1] for out, _ in outputs}  # DeepSpeed prints a line as well
    assert len(paths) == 1
    assert sum("is read and dequantised" in err for _, err in outputs) == 1
    assert close(AutoModelForCausalLM.from_pretrained(paths.pop()).lm_head.weight, model.lm_head.weight)


def test_zero_3_does_not_partition_what_is_kept(model, file, cache):
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    settings = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    path = Path(reading.model_path(str(file)))
    assert is_deepspeed_zero3_enabled()
    del settings
    assert not is_deepspeed_zero3_enabled()
    assert close(AutoModelForCausalLM.from_pretrained(path).lm_head.weight, model.lm_head.weight)


def test_what_a_killed_process_left_is_not_used(model, file, cache):
    path = Path(reading.model_path(str(file)))
    shutil.move(path, path.with_name(path.name + ".tmp"))
    (path.with_name(path.name + ".tmp") / "model.safetensors").write_bytes(b"cut")
    assert close(load_model(str(file), "causal-lm").lm_head.weight, model.lm_head.weight)
    assert sorted(p.name for p in cache.iterdir()) == [path.name, f"{path.name}.lock"]


def test_an_adapter_names_the_file_and_merges(model, file, tmp_path):
    sparse = load_model(str(file), "causal-lm")
    sparsify(sparse, SparseConfig(density=0.01)).sparsity.base_model = str(file)
    optimizer = torch.optim.AdamW([p for p in sparse.parameters() if p.requires_grad], lr=0.05)
    sparse(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    save_adapter(sparse, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter").base_model_name_or_path == str(file)
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(TOKENS).logits, sparse.eval()(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == 2
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    # As transformers' own loading of the file has it
    own = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    load_adapter(own, tmp_path / "adapter")
    assert torch.equal(own.eval()(TOKENS).logits, merged(TOKENS).logits)


def test_its_adapters_are_inspected_and_converted(model, file, tmp_path):
    sparse = sparsify(load_model(str(file), "causal-lm"), SparseConfig(density=0.01))
    sparse.sparsity.base_model = str(file)
    with torch.no_grad():
        for weight in sparse.sparsity.weights.values():
            weight.delta.normal_()
    save_adapter(sparse, tmp_path / "adapter")
    facts = describe(tmp_path / "adapter")
    assert (facts["base_model"], facts["notes"]) == (str(file), [])
    convert(tmp_path / "adapter", tmp_path / "shira", "shira")
    # What other programs open is a directory that transformers loads
    base = json.loads((tmp_path / "shira" / "adapter_config.json").read_text())["base_model_name_or_path"]
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "shira")
    assert torch.allclose(opened(TOKENS).logits, sparse.eval()(TOKENS).logits, atol=1e-5)
    convert(tmp_path / "shira", tmp_path / "back", "sparse-zero", str(file))
    again = load_adapter(load_model(str(file), "causal-lm"), tmp_path / "back")
    assert torch.allclose(again.eval()(TOKENS).logits, sparse(TOKENS).logits, atol=1e-5)


def test_a_model_that_transformers_opened_names_its_file(model, file, tmp_path):
    own = sparsify(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name), SparseConfig(density=0.01))
    assert own.sparsity.base_model == str(file)


@pytest.mark.parametrize("name", ["org/repo/nested/tiny.gguf", "org/repo"])
def test_a_file_of_the_hub(model, file, monkeypatch, name):
    asked = []
    monkeypatch.setattr(reading, "hf_hub_download", lambda *a, **k: (asked.append((a, k)), str(file))[1])
    section = {"name": name, "gguf_file": None if name.endswith(".gguf") else "nested/tiny.gguf"}
    recipe = Recipe.model_validate(
        {"model": {**section, "task": "causal-lm"}, "data": {"path": "d", "columns": {"text": "t"}}}
    )
    assert recipe.model.source == "org/repo/nested/tiny.gguf"
    load_model(recipe.model.source, "causal-lm", revision="v1")
    assert {str(call) for call in asked} == {str((("org/repo", "nested/tiny.gguf"), {"revision": "v1"}))}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no/such.gguf", "no such file 'no/such.gguf'; on the hub, write ORGANISATION/REPOSITORY/FILE.gguf"),
        ("org/repo/no.gguf", "org/repo/no.gguf is no file here and cannot be downloaded"),
        ("package://sparse_zero/no.gguf", "has no 'no.gguf'"),
    ],
)
def test_a_file_that_is_not_there(name, expected):
    with pytest.raises(UserError, match=expected):
        load_model(name, "causal-lm")


def test_damaged_files_and_pipes_are_refused(model, file, tmp_path, cache):
    content = file.read_bytes()
    for damaged in (b"", b"GGUF", content[:200], content[: len(content) // 2], b"x" + content[1:]):
        file.write_bytes(damaged)
        for load in (load_config, load_tokenizer):
            with pytest.raises(UserError, match=r"model.name: .*tiny.gguf cannot be read as GGUF: \S"):
                load(str(file))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UserError, match="is not a file but a pipe or device"):
        load_config(str(tmp_path / "pipe.gguf"))
    assert not any(path.is_dir() for path in cache.iterdir())


def test_without_the_package(model, file, monkeypatch):
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'sparse-zero\[gguf\]'"):
        load_config(str(file))


def test_a_cache_that_cannot_be_written(model, file, tmp_path, monkeypatch):
    (tmp_path / "full").write_text("")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "full"))
    with pytest.raises(UserError, match="set HF_ASSETS_CACHE"):
        load_tokenizer(str(file))
