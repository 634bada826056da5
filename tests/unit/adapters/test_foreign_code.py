"""No code runs that somebody wrote into an adapter or a base model, and no file is opened that could do harm."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapter_cases import edit_config
from stranger_cases import CONFIG, WEIGHTS, refused_everywhere, reseal, set_in
from transformers import dynamic_module_utils

from launcher.cli import main
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.data.models import load_config, load_model, load_tokenizer
from sparse_zero.errors import UserError

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(bases, tmp_path, monkeypatch):
    """A base model with Python code of its own, and the file that exists once the code has run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    # transformers asks on the terminal whether to run the code unless it is told
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    base, marker = Path(shutil.copytree(bases["llama"], tmp_path / "own")), tmp_path / "ran"
    (base / "own_code.py").write_text(CODE.format(marker=str(marker)))
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    set_in(base / "config.json", model_type="own", auto_map=auto, architectures=["OwnModel"])
    return base, marker


SETTINGS = {
    "trust_remote_code": True,
    "attn_implementation": "organisation/kernel",
    "_attn_implementation": "organisation/kernel",
    "experts_implementation": "organisation/kernel",
    "code_revision": "main",
    "quantization_config": {"load_in_4bit": True},
    "auto_map": {"AutoModelForCausalLM": "own_code.OwnModel"},
    "use_kernels": True,
    "cache_dir": "/tmp",
    "state_dict": {},
    "device_map": "auto",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_only_the_entries_of_a_task_are_model_settings(llama, own_code, tmp_path, setting):
    base, marker = own_code
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    edit_config(llama, lambda config: config["model_settings"].update({setting: SETTINGS[setting]}))
    with pytest.raises(UserError, match=f"{CONFIG}: model_settings.{setting}: "):
        write_merged(llama, tmp_path / "out", trust_remote_code=True)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("id2label", ["a", "b"]),
        ("id2label", {"0": 1}),
        ("id2label", {"zero": "a"}),
        ("id2label", {"00": "a"}),
        ("id2label", {"-1": "a"}),
        ("label2id", {"a": "0"}),
        ("label2id", {"a": True}),
        ("problem_type", "org/kernel"),
        ("pad_token_id", 1.0),
        ("pad_token_id", True),
        ("pad_token_id", [0]),
        ("pad_token_id", 10**30),
    ],
)
def test_model_settings_have_their_types(llama, bases, tmp_path, entry, value):
    edit_config(llama, lambda config: config["model_settings"].update({entry: value}))
    assert f"model_settings.{entry}" in refused_everywhere(llama, bases["llama"], tmp_path / "out")


def test_code_of_the_base_model_runs_only_if_the_caller_says_so(llama, own_code, bases, tmp_path, capsys):
    base, marker = own_code
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    expected = r"has Python code of its own, which is not run; .* --trust-remote-code"
    for call in (
        lambda: write_merged(llama, tmp_path / "out"),
        lambda: convert(llama, tmp_path / "out", "sparta"),
        lambda: convert(base, tmp_path / "out", base=str(bases["llama"])),
        lambda: describe(base, str(bases["llama"])),
        lambda: load_model(str(base), "causal-lm"),
        lambda: load_config(str(base)),
    ):
        with pytest.raises(UserError, match=expected):
            call()
    assert main(["merge", str(llama), str(tmp_path / "out")]) == 2
    assert not marker.exists()
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["merge", str(llama), str(tmp_path / "out"), "--trust-remote-code"]) == 0
    assert marker.exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_code_of_a_tokenizer_is_not_run(llama, own_code, tmp_path):
    base, marker = own_code
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(base / "own_code.py", tokenizer)
    auto = {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": auto}))
    with pytest.raises(UserError, match="has Python code of its own"):
        load_tokenizer(str(tokenizer))
    edit_config(llama, lambda config: config.update(tokenizer=str(tokenizer)))
    with pytest.raises(UserError, match="has Python code of its own"):
        write_merged(llama, tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_base_model_names_is_not_loaded(bases, llama, tmp_path, monkeypatch, key):
    loaded = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: loaded.append(a))
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    set_in(base / "config.json", **{key: "organisation/kernel"})
    with pytest.raises(UserError, match=r"asks for the kernel 'organisation/kernel', which .* would download and run"):
        load_model(str(base), "causal-lm")
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    for call in (write_merged, lambda *paths: convert(*paths, "sparta")):
        with pytest.raises(UserError, match="organisation/kernel"):
            call(llama, tmp_path / "out")
    assert loaded == []


def test_a_peft_adapter_in_the_base_model_is_not_loaded(bases, llama, tmp_path):
    """PEFT imports the module that `megatron_core` names."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    config = {"peft_type": "LORA", "target_modules": ["v_proj"], "megatron_core": "antigravity", "megatron_config": {}}
    (base / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    with pytest.raises(UserError, match=r"its base model .*base has an adapter of its own \(.*adapter_config.json\)"):
        write_merged(llama, tmp_path / "out")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "added_tokens.json", "other"])
def test_a_pipe_in_a_base_model_is_not_opened(bases, llama, tmp_path, name):
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    for call in (lambda: write_merged(llama, tmp_path / "out"), lambda: load_tokenizer(str(base))):
        with pytest.raises(UserError, match=f"{name}: is not a file but a pipe or device"):
            call()


def test_a_pickle_in_an_adapter_is_not_opened(llama, bases, tmp_path):
    torch.save({"x": torch.ones(1)}, llama / WEIGHTS)
    reseal(llama)
    assert "damaged" in refused_everywhere(llama, bases["llama"], tmp_path / "out")
