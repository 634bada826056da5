"""merge_and_unload of a quantised base gives a plain model with the same outputs, which transformers loads alone."""

import json

import pytest
import torch
from families import tiny
from quantized_cases import KINDS, SIZES, batch, dequantized_by_its_library, is_quantized, load, save_base
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sparse_zero import SparseConfig, merge_and_unload, set_scale, sparsify
from sparse_zero.quantized.formats import quantized_layers


def trained(model, **settings):
    sparsify(model, SparseConfig(**{"targets": ["q_proj", "down_proj"], "density": 0.02} | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_dequantised_ones_with_the_deltas(base, tmp_path, kind):
    model = trained(load(base, kind))
    set_scale(model, 0.5)
    data = batch()
    logits = model(**data).logits
    expected = {
        f"{path}.weight": dequantized_by_its_library(module)
        for path, module in model.named_modules()
        if is_quantized(module)
    }
    for name, weight in model.sparsity.weights.items():
        expected[name].view(-1)[weight.flat_positions()] += 0.5 * weight.delta.detach()
    merged = merge_and_unload(model)
    assert merged is model
    assert not list(quantized_layers(model))
    for name, values in expected.items():
        torch.testing.assert_close(model.get_parameter(name), values, check_device=False)
    torch.testing.assert_close(model(**data).logits, logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {*tiny("llama", **SIZES).state_dict()}
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").train()
    assert torch.equal(alone(**data).logits, model(**data).logits)
    assert not getattr(alone, "is_quantized", False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize("kind", ["nf4-double", "int8_weight_only"])
def test_in_bfloat16_within_its_rounding(half_base, kind):
    data = batch()
    model = trained(load(half_base, kind, torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16))
    before = load(half_base, kind, torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16)(**data).logits.float()
    adapted = model(**data).logits.float()
    merged = merge_and_unload(model)(**data).logits.float()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (merged - adapted).abs().max() < 0.1 * (adapted - before).abs().max()


def test_layers_of_gpt2_are_transposed_back(tmp_path):
    """transformers quantises the transpose of its Conv1D; its own `dequantize` leaves nn.Linear layers, whose weights
    a plain GPT-2 cannot load."""
    save_base(tmp_path / "base", "gpt2", vocab_size=48)
    model, data = trained(load(tmp_path / "base", "nf4"), targets=["c_attn"]), batch()
    assert [*model.sparsity.weights] == [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]
    assert model.sparsity.weights["transformer.h.0.attn.c_attn.weight"].shape == (48, 16)
    logits = model(**data).logits
    merge_and_unload(model)
    torch.testing.assert_close(model(**data).logits, logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    torch.testing.assert_close(alone(**data).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8", "int8_weight_only", "int8_weight_only-16"])
def test_quantising_again_gives_a_layer_like_the_old_one(base, kind):
    model = load(base, kind)
    data = batch()
    logits = model(**data).logits
    for name, layer in list(quantized_layers(model)):
        again = layer.quantize(layer.dequantized(torch.float32))
        model.set_submodule(name.removesuffix(".weight"), again)
        assert type(again) is type(layer.module)
    assert {layer.kind for _, layer in quantized_layers(model)} == {kind}
    torch.testing.assert_close(model(**data).logits, logits, rtol=1e-2, atol=5e-2)


def test_bytes_of_a_layer(base):
    """By hand: 64 weights share a float32 scale; with double quantisation 256 scales of a byte share one; the tables
    of codes have 16 and 256 entries."""
    name, weights = "model.layers.0.mlp.up_proj.weight", 64 * 32
    blocks = weights // 64
    expected = {
        "nf4": (weights // 2, 4 * blocks + 4 * 16),
        "nf4-double": (weights // 2, blocks + 4 + 4 + 4 * (16 + 256)),
        "int8": (weights, 4 * 64),
        "int8_weight_only": (weights, (4 + 1) * 64),
        "int8_weight_only-16": (weights, (4 + 1) * 64 * 2),
    }
    for kind, sizes in expected.items():
        layer = dict(quantized_layers(load(base, kind)))[name]
        assert (layer.packed_bytes, layer.statistics_bytes) == sizes, kind
        assert layer.shape == (64, 32)
