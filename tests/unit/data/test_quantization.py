"""A base model is quantised as transformers does it, whatever it is read from; the rest of it stays as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny
from gguf_cases import write_gguf
from huggingface_hub import constants
from quantized_cases import config_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparse_zero.data import quantization as reading
from sparse_zero.data.models import load_config, load_model, meta_model
from sparse_zero.data.quantization import check_trainable, completed, from_transformers
from sparse_zero.errors import UserError
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.selection.config import SparseConfig

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = {
    "nf4": ({"kind": "nf4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4, double": (
        {"kind": "fp4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "float32"},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "float32"},
    ),
    "int8": ({"kind": "int8", "llm_int8_threshold": 0.0}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
    "int8_weight_only": ({"kind": "int8_weight_only"}, "int8_weight_only"),
    "groups": ({"kind": "int8_weight_only", "group_size": 16}, "int8_weight_only-16"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny("llama", tie_word_embeddings=True, hidden_size=32, intermediate_size=48).save_pretrained(path)
    return path


def resolved(path: Path | str, keys: dict, task: str = "causal-lm", **options) -> Quantization:
    model = meta_model(load_config(str(path)), task, torch.float32)
    options = {"dtype": torch.float32} | options
    return completed(Quantization(**keys), model, SparseConfig(), **options)


def loaded(path: Path | str, keys: dict, task: str = "causal-lm"):
    return load_model(str(path), task, dtype="float32", quantization=resolved(path, keys, task))


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same values and the same packed weights and statistics."""
    layers, others = dict(quantized_layers(one)), dict(quantized_layers(other))
    plain = {name: value for name, value in one.named_parameters() if name not in layers}
    same = all(torch.equal(value, other.get_parameter(name)) for name, value in plain.items())
    return (
        same
        and layers.keys() == others.keys() != set()
        and all(torch.equal(layer.packed, others[name].packed) for name, layer in layers.items())
        and all(
            torch.equal(mine, its)
            for name, layer in layers.items()
            for mine, its in zip(layer.statistics(), others[name].statistics(), strict=True)
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_makes_of_the_same_settings(base, kind):
    ours, theirs = KINDS[kind]
    model = loaded(base, ours)
    config = config_of(theirs) if isinstance(theirs, str) else BitsAndBytesConfig(**theirs)
    expected = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    assert equal(model, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_loads_as_it_is_and_says_what_it_is(base, tmp_path, kind):
    keys, _ = KINDS[kind]
    model = loaded(base, keys)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "causal-lm", dtype="float32")
    assert equal(again, model)
    known = from_transformers(load_config(str(tmp_path)).quantization_config)
    assert known == from_transformers(again.config.quantization_config) == resolved(base, keys)
    with pytest.raises(UserError, match=rf"model\.quantization: base is quantised already, to {known.kind}: leave"):
        check_trainable("base", again.config, Quantization(kind="nf4"))
    check_trainable("base", again.config, None)


def test_a_gguf_file_can_be_quantised_too(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    write_gguf(tmp_path / "tiny.gguf", tokenizer_dir)
    model = loaded(tmp_path / "tiny.gguf", {"kind": "nf4"})
    load_model(str(tmp_path / "tiny.gguf"), "causal-lm").save_pretrained(tmp_path / "plain")
    assert equal(model, loaded(tmp_path / "plain", {"kind": "nf4"}))


@pytest.mark.parametrize(("family", "kind"), [("bert", "int8"), ("roberta", "int8_weight_only")])
def test_a_head_that_is_trained_in_full_is_not_quantised(tmp_path, family, kind):
    tiny(family, "sequence-classification").base_model.save_pretrained(tmp_path)
    model = loaded(
        tmp_path, {"kind": kind, "llm_int8_skip_modules": [".*layer.1", "query"]}, "sequence-classification"
    )
    names = [name for name, _ in quantized_layers(model)]
    assert names
    assert not [name for name in names if "classifier" in name or "layer.1." in name or "query" in name]


def test_what_depends_on_the_run_is_filled_in(base):
    def storage(**options) -> tuple:
        found = resolved(base, {"kind": "nf4"}, **options)
        return found.bnb_4bit_quant_storage, found.bnb_4bit_compute_dtype

    assert storage() == ("uint8", "float32")
    assert storage(dtype=torch.bfloat16) == ("uint8", "bfloat16")
    assert storage(dtype=torch.bfloat16, cast_to=torch.bfloat16, partitioned=True) == ("bfloat16", "bfloat16")
    assert storage(partitioned=True) == ("float32", "float32")
    assert storage(cast_to=torch.float16) == ("uint8", "float16")
    own = {"kind": "nf4", "bnb_4bit_quant_storage": "float32", "bnb_4bit_compute_dtype": "float16"}
    assert resolved(base, own).model_dump(exclude={"llm_int8_skip_modules"}).items() >= own.items()
    with pytest.raises(UserError, match="storage: float32: DeepSpeed would convert the packed bits to bfloat16"):
        resolved(base, own, cast_to=torch.bfloat16)
    assert resolved(base, {"kind": "int8"}, partitioned=True) == resolved(base, {"kind": "int8"})
    with pytest.raises(UserError, match="int8_weight_only: ZeRO stage 3 cannot partition torchao's weights: use"):
        resolved(base, {"kind": "int8_weight_only"}, partitioned=True)


def test_what_torchao_cannot_quantise_is_said_before(base, tmp_path):
    """It would leave the layers as they are: in groups that do not fit with a note in its log, GPT-2's without one."""
    with pytest.raises(UserError, match=r"group_size: 32 does not divide 48, the width of a layer"):
        resolved(base, {"kind": "int8_weight_only", "group_size": 32})
    left_out = {"kind": "int8_weight_only", "group_size": 32, "llm_int8_skip_modules": ["down_proj"]}
    assert len(dict(quantized_layers(loaded(base, left_out)))) == 2 * 6
    for task in ("causal-lm", "sequence-classification"):
        tiny("gpt2", task).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"has no nn\.Linear that torchao could quantise; set int8"):
            resolved(tmp_path, {"kind": "int8_weight_only"}, task)


def test_importing_the_libraries_prints_nothing():
    code = "from sparse_zero.quantized.quiet_imports import silence_imports as s; s(); import bitsandbytes, torchao"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("int8_weight_only", "torchao")])
def test_a_missing_package_is_named(base, monkeypatch, tmp_path, kind, package):
    keys = resolved(base, {"kind": kind})
    loaded(base, {"kind": kind}).save_pretrained(tmp_path)
    find_spec = reading.importlib.util.find_spec
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    install = rf"needs the package {package}: pip install 'sparse-zero\[quantization\]'"
    with pytest.raises(UserError, match=rf"^model\.quantization: {kind} {install}"):
        load_model(str(base), "causal-lm", quantization=keys)
    with pytest.raises(UserError, match=rf"is quantised: {kind} {install}"):
        load_model(str(tmp_path), "causal-lm")


INT4 = {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 128}}
METHODS = {
    "torchao (Int4WeightOnlyConfig)": {"quant_method": "torchao", "quant_type": {"default": INT4}},
    **{name: {"quant_method": name} for name in ("gptq", "awq", "hqq", "compressed-tensors", "torchao", "fp8")},
    "an unknown method": {"bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_another_method_is_refused_by_name(base, tmp_path, method):
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": METHODS[method]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        check_trainable("this", load_config(str(tmp_path)), None)
    assert str(error.value).startswith(f"model.name: this is quantised by {method}, in whose weights no scalars")
    assert "nf4, fp4, int8 or int8_weight_only" in str(error.value)


def test_it_warns_of_widths_that_bitsandbytes_dequantises_wrongly(tmp_path, caplog):
    """With bitsandbytes 0.50 on a CPU with AVX512, the weights of 96 columns are wrong, by its own code table."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tiny("llama", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    loaded(tmp_path, {"kind": "nf4", "llm_int8_skip_modules": ["down_proj"]})
    assert not caplog.messages
    loaded(tmp_path, {"kind": "nf4"})
    (message,) = caplog.messages
    assert message.startswith("bitsandbytes may dequantise model.layers.0.mlp.down_proj.weight and 1 more wrongly")
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(values, quant_type="nf4", blocksize=64)
    blocks = values.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - state.code).abs().argmin(-1)
    torch.testing.assert_close(dequantize_4bit(packed, state), (state.code[nearest] * largest).view(64, 64))
