"""Adapters of a quantised base model: they know how to quantise it again, open, answer and merge."""

import json
from pathlib import Path

import pytest
import torch
from quantized_cases import config_of, dequantized_by_its_library, is_quantized, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from launcher.cli import main
from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.data.models import load_config, load_model, meta_model
from sparse_zero.data.quantization import completed
from sparse_zero.generation.language_model import open_model
from sparse_zero.model.sparsify import sparsify
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.selection.config import SparseConfig

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

SPARSE = SparseConfig(density=0.02, targets=["q_proj", "down_proj"])
KINDS = {"nf4": {}, "fp4": {"bnb_4bit_use_double_quant": True}, "int8": {}, "int8_weight_only": {}}
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir) -> Path:
    path = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    save_base(path, hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


def loaded(base: Path, kind: str | None):
    if kind is None:
        return load_model(str(base), "causal-lm", dtype="float32")
    plain = meta_model(load_config(str(base)), "causal-lm", torch.float32)
    quantization = completed(Quantization(kind=kind, **KINDS[kind]), plain, SPARSE, torch.float32)
    return load_model(str(base), "causal-lm", dtype="float32", quantization=quantization)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str | None, Path]:
    """An adapter of each kind of base; its deltas are large."""
    found = {}
    for kind in (*KINDS, None):
        model = sparsify(loaded(base, kind), SPARSE)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.sparsity.weights.values():
                weight.delta.copy_(torch.randn(weight.delta.shape, generator=generator) / 4)
        found[kind] = tmp_path_factory.mktemp("adapter")
        save_adapter(model, found[kind])
    return found


def logits(model) -> torch.Tensor:
    """In training mode, in which bitsandbytes does not repack weights on some CPUs, and does not round inputs."""
    with torch.no_grad():
        return model.train()(input_ids=TOKENS).logits.float()


def adapted(base, adapters, kind):
    return load_adapter(loaded(base, kind), adapters[kind])


def expected_weights(model) -> dict[str, torch.Tensor]:
    """Each quantised weight of a sparse model with its deltas, by bitsandbytes' own dequantisation."""
    found = {}
    for path, module in model.named_modules():
        if is_quantized(module):
            found[f"{path}.weight"] = dequantized_by_its_library(module)
    for name, weight in model.sparsity.weights.items():
        found[name].view(-1)[weight.flat_positions()] += weight.delta.detach()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_merges_into_a_dequantised_model_in_bfloat16(base, adapters, tmp_path, kind):
    model = adapted(base, adapters, kind)
    facts = write_merged(adapters[kind], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    for name, values in expected_weights(model).items():
        torch.testing.assert_close(merged.get_parameter(name).float(), values, rtol=2**-8, atol=1e-6)
    assert facts["weights"] == "bfloat16, dequantised"
    assert 0 < facts["mean_difference_of_logits"] < facts["largest_difference_of_logits"]
    # int8: bitsandbytes also rounds the inputs when it evaluates
    assert facts["largest_difference_of_logits"] < (0.1 if kind == "int8" else 0.03) * facts["largest_logit"]
    assert (logits(merged) - logits(model)).abs().max() < 0.1 * facts["largest_logit"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_merges_into_the_same_kind(base, adapters, tmp_path, kind):
    model = adapted(base, adapters, kind)
    values = expected_weights(model)
    facts = write_merged(adapters[kind], tmp_path / "out", quantize=kind)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert facts["weights"] == kind
    before, after = dict(quantized_layers(loaded(base, kind))), dict(quantized_layers(merged))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].packed, after[name].packed)}
    assert changed == {*model.sparsity.weights}, "weights without deltas stay bit for bit"
    steps = {"nf4": 0.1525, "fp4": 0.1701, "int8": 1 / 250, "int8_weight_only": 1 / 250}[kind]
    for name, layer in after.items():
        assert layer.kind == before[name].kind
        # No further from the adapted value than half of the largest step of the format, of the largest in the block
        assert (layer.dequantized(torch.float32) - values[name]).abs().max() <= steps * values[name].abs().max()
    # What the facts say is what a program finds that loads the directory
    assert facts["largest_difference_of_logits"] > 0
    assert (logits(merged) - logits(model)).abs().max() < 2 * facts["largest_difference_of_logits"] + 1


@pytest.mark.parametrize(("kind", "other"), [("nf4", "int8_weight_only"), (None, "nf4"), ("int8", "fp4")])
def test_it_merges_into_another_kind(base, adapters, tmp_path, kind, other):
    facts = write_merged(adapters[kind], tmp_path / "out", quantize=other, prompts=["one", "two words"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    write_merged(adapters[kind], tmp_path / "plain")
    config = merged.config.quantization_config
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=own(config, other)
    )
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("out", "plain")] == []
    assert {layer.kind for _, layer in quantized_layers(merged)} == {other}
    assert facts["weights"] == other
    if kind is None:  # the plain model is not rounded to bfloat16 then
        for name, layer in quantized_layers(merged):
            assert torch.equal(layer.packed, dict(quantized_layers(expected))[name].packed)


def own(config, kind: str) -> BitsAndBytesConfig | TorchAoConfig:
    if kind == "int8_weight_only":
        return config_of(kind)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, llm_int8_skip_modules=config.llm_int8_skip_modules
    )


def test_a_plain_merge_has_no_comparison(adapters, tmp_path):
    facts = write_merged(adapters[None], tmp_path / "out")
    assert not [name for name in facts if "logit" in name or name == "weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_on_the_base_quantised_as_in_training(base, adapters, kind, caplog):
    opened = open_model(str(adapters[kind]))
    assert torch.equal(logits(opened.model), logits(adapted(base, adapters, kind)))
    assert not caplog.messages
    assert opened.answer([opened.prompt_of_text("hello")], max_new_tokens=3)


def test_the_adapter_and_its_card_say_how(base, adapters):
    config = read_config(adapters["fp4"])
    assert config.quantization.model_dump() == {
        "kind": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": None,
        "group_size": None,
        "llm_int8_skip_modules": ["lm_head"],
    }
    assert read_config(adapters[None]).quantization is None
    assert describe(adapters["fp4"])["base_quantised_to"] == {"fp4-double": "(14 weights)"}
    assert describe(adapters[None])["base_quantised_to"] is None
    for kind, made in (("fp4", "fp4-double"), ("int8_weight_only", "int8_weight_only")):
        card = (adapters[kind] / "README.md").read_text()
        code = card.partition("```python\n")[2].partition("```")[0].replace("path/to/the/base/model", str(base))
        names: dict = {}
        exec(code.replace("path/to/this/directory", str(adapters[kind])), names)
        kinds = [layer.kind for _, layer in quantized_layers(names["model"])]
        assert kinds == [made] * 14


def test_it_converts_with_a_note(base, adapters, tmp_path):
    facts = convert(adapters["nf4"], tmp_path / "out", "shira", base=str(base))
    note = "trained on a base model in nf4: put it on one that is quantised in the same way"
    assert note in facts["notes"]
    assert facts["selected_scalars"] == read_config(adapters["nf4"]).trainable_parameters
    assert "quantised" not in str(convert(adapters[None], tmp_path / "plain", "shira", base=str(base))["notes"])


def test_the_command(adapters, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["merge", str(adapters["nf4"]), out, "--quantize", "nf4", "--prompt", "hello there"]) == 0
    printed = capsys.readouterr().out
    assert "mean difference of logits" in printed
    assert "same prediction" in printed
    assert main(["inspect", str(adapters["nf4"])]) == 0
    assert "nf4 (14 weights)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["merge", str(adapters["nf4"]), out + "2", "--quantize", "gptq"])
