"""`model.quantization`: a kind, or a section with the keys of transformers' BitsAndBytesConfig."""

import inspect

import pytest
from transformers import BitsAndBytesConfig

from sparse_zero.errors import UserError
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.recipe.recipe import load_recipe

RECIPE = """
model: {name: some/model, task: causal-lm}
data: {path: d.jsonl, columns: {text: text}}
"""


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_recipe(path, list(overrides)).model.quantization


def test_a_kind_alone_is_a_section(read):
    assert read() is None
    for kind in ("nf4", "fp4", "int8", "int8_weight_only"):
        assert read(f"model.quantization={kind}") == Quantization(kind=kind)
    both = read("model.quantization.kind=nf4", "model.quantization.bnb_4bit_use_double_quant=true")
    assert both == Quantization(kind="nf4", bnb_4bit_use_double_quant=True)


def test_its_keys_are_those_of_transformers():
    known = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert set(Quantization.model_fields) - {"kind", "group_size"} <= set(known)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=gptq", "model.quantization.kind: must be nf4, fp4, int8 or int8_weight_only, not 'gptq'"),
        ("=4bit", "must be nf4, fp4, int8 or int8_weight_only; did you mean nf4?, not '4bit'"),
        ("=int8wo", "did you mean int8_weight_only?, not 'int8wo'"),
        ("=int4_weight_only", "did you mean nf4?, not 'int4_weight_only'"),
        ("={kind: int8, group_size: 32}", "group_size is not a key of int8; leave it out"),
        ("={kind: int8_weight_only, llm_int8_threshold: 1}", "llm_int8_threshold is not a key of int8_weight_only"),
        ("=8", "did you mean int8?, not '8'"),
        ("={load_in_4bit: true}", "model.quantization: write `kind: nf4` instead of `load_in_4bit`"),
        ("={load_in_8bit: true}", "write `kind: int8` instead of `load_in_8bit`"),
        ("={bnb_4bit_use_double_quant: true}", "model.quantization.kind is missing"),
        ("={kind: int8, bnb_4bit_use_double_quant: true}", "bnb_4bit_use_double_quant is not a key of int8"),
        ("={kind: fp4, llm_int8_threshold: 0}", "llm_int8_threshold is not a key of fp4; leave it out"),
        ("={kind: int8, llm_int8_threshold: -1}", "llm_int8_threshold: input should be greater than or equal to 0"),
        ("={kind: nf4, bnb_4bit_compute_dtype: bf16}", "input should be 'float32', 'bfloat16' or 'float16', not 'bf"),
        ("={kind: nf4, bnb_4bit_compute_dtyp: float32}", "did you mean 'bnb_4bit_compute_dtype'?"),
        ("=[nf4]", "model.quantization: input should be a valid dictionary"),
    ],
)
def test_what_cannot_work_is_one_sentence(read, override, message):
    with pytest.raises(UserError) as error:
        read(f"model.quantization{override}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
