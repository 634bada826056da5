"""`sparse-zero plan` of a quantised base model: its bytes are those of a really quantised one."""

import json
from pathlib import Path

import pytest
import torch
from quantized_cases import load, save_base

from launcher.cli import main
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.planning.plan import allocations, device_bytes, plan
from sparse_zero.planning.planned_run import describe_run
from sparse_zero.planning.quantized_sizes import QuantizedSizes
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.recipe import load_recipe

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = {
    "nf4": "{kind: nf4}",
    "nf4-double": "{kind: nf4, bnb_4bit_use_double_quant: true}",
    "fp4": "{kind: fp4}",
    "int8": "{kind: int8}",
    "int8_weight_only": "{kind: int8_weight_only}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    # Sizes of which no weight fills its blocks, nor the blocks of its scales
    return save_base(tmp_path_factory.mktemp("base"), hidden_size=36, intermediate_size=300, tie_word_embeddings=True)


@pytest.fixture
def recipe(base, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {{name: {base}, task: causal-lm}}\n"
        "data: {path: text, columns: {text: text}, max_length: 16}\n"
        "sparse: {density: 0.05, targets: all-linear}\n"
    )
    return lambda *overrides: load_recipe(path, list(overrides))


def size_of(tensors) -> int:
    """Bytes, each storage once."""
    tensors = [getattr(t, "qdata", t) for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_quantised_model(base, recipe, kind):
    run = describe_run(recipe(f"model.quantization={KINDS[kind]}"))
    model = load(base, kind)
    layers = dict(quantized_layers(model))
    found = run.quantized
    assert found.shapes == {name: tuple(layer.shape) for name, layer in layers.items()}
    for name, layer in layers.items():
        assert (found.packed(name), found.statistics(name)) == (layer.packed_bytes, layer.statistics_bytes)
    held = {each.what: each.bytes for each in allocations(run, run.zero_settings("2"), 1)}
    assert held["weights"] == size_of(model.parameters())
    assert held["statistics"] == sum(layer.statistics_bytes for layer in layers.values())
    assert held["dequantised"] == 4 * 36 * 300
    sparsify(model, recipe().sparse)
    assert run.parameters == model.sparsity.total_parameters
    assert sorted(run.sizes.selected) == sorted(w.selection.count for w in model.sparsity.weights.values())
    assert "originals" not in {each["what"] for each in plan(run, 1)["stages"][0]["holds"]}


def test_bits_by_the_definition_of_the_formats(recipe):
    """QLoRA (arXiv 2305.14314, section 3): 0.5 bits of scales for each scalar, 0.127 with double quantisation."""
    bits = {
        kind: QuantizedSizes(recipe(f"model.quantization={given}").model.quantization, {"w": (8192, 28672)}).bits
        for kind, given in KINDS.items()
    }
    assert bits["nf4"] == bits["fp4"] == pytest.approx(4.5, abs=1e-4)
    assert bits["nf4-double"] == pytest.approx(4.127, abs=1e-3)
    assert bits["int8"] == pytest.approx(8 + 32 / 28672)
    assert bits["int8_weight_only"] == pytest.approx(8 + (32 + 8) / 28672)


def test_stage_3_partitions_the_packed_weights_and_not_the_statistics(recipe):
    run = describe_run(recipe("model.quantization=nf4"))
    by_ranks = {}
    for ranks in (1, 4):
        settings = run.zero_settings("3")
        by_ranks[ranks] = {each.what: each.bytes for each in allocations(run, settings, ranks)}
    assert by_ranks[4]["weights"] == pytest.approx(by_ranks[1]["weights"] / 4, rel=0.01)
    assert by_ranks[4]["statistics"] == by_ranks[1]["statistics"]
    assert device_bytes(run, run.zero_settings("3"), 10**6) >= run.quantized.packed_bytes


def test_a_checkpoint_that_is_quantised_is_planned_as_it_is(base, recipe, tmp_path):
    load(base, "nf4-double").save_pretrained(tmp_path / "packed")
    other = describe_run(recipe(f"model.name={tmp_path / 'packed'}"))
    assert other.quantized.shapes == describe_run(recipe("model.quantization=nf4")).quantized.shapes
    assert other.quantized.quantization.bnb_4bit_use_double_quant
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised by gptq"):
        describe_run(recipe(f"model.name={tmp_path}"))


def test_what_is_printed(base, recipe, tmp_path, capsys):
    recipe()
    command = ["plan", str(tmp_path / "r.yaml"), "model.quantization=nf4", "training.bf16=true", "--ranks", "2"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    scalars = 2 * (36 * 36 * 2 + 36 * 18 * 2 + 3 * 36 * 300)
    assert f"{scalars:,} of them in nf4 (" in printed
    assert "scales of the quantised weights" in printed
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quantization"]["parameters"] == scalars
    assert facts["quantization"]["packed_bytes"] == scalars // 2
    assert facts["bytes_per_scalar"] == torch.bfloat16.itemsize


def test_init_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(8)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "chats.jsonl", "--quantize", "nf4"]) == 0
    assert "quantization: nf4  # needs pip install" in capsys.readouterr().out
    assert load_recipe(tmp_path / "chats.yaml").model.quantization.kind == "nf4"
