"""Models that are quantised in formats which are not known here are refused by name, and stay as they are."""

import logging

import pytest
import torch
from families import tiny
from torch import nn
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.eetq import EetqLinear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.higgs import HiggsLinear
from transformers.utils.quantization_config import HqqConfig

from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.quantized.methods import packed_modules
from sparse_zero.selection.config import SparseConfig


class QuantLinear(nn.Module):
    """The layer of GPTQ and AWQ has this name and these buffers."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(columns // 8, rows, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, rows, dtype=torch.float16))


class HQQLinear(nn.Module):
    """The layer of HQQ has this name and this parameter."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(rows, columns // 2, dtype=torch.uint8), requires_grad=False)


def compressed(columns: int, rows: int) -> nn.Linear:
    """compressed-tensors replaces the weight of a layer."""
    layer = nn.Linear(columns, rows, bias=False)
    del layer.weight
    layer.weight_packed = nn.Parameter(torch.zeros(rows, columns // 8, dtype=torch.int32), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.ones(rows, 1), requires_grad=False)
    return layer


LAYERS = {
    "gptq": QuantLinear,
    "awq": QuantLinear,
    "hqq": HQQLinear,
    "compressed-tensors": compressed,
    "eetq": EetqLinear,
    "bitnet": lambda columns, rows: BitLinear(columns, rows, bias=False),
    "higgs": lambda columns, rows: HiggsLinear(256 * columns, rows, 4, bias=False),
}
NAME = "model.layers.1.self_attn.v_proj"


def model_of(method: str, layer, config=None) -> nn.Module:
    """A model in which only one layer is quantised: the others would be trained without a word."""
    model = tiny("llama", hidden_size=16)
    old = model.get_submodule(NAME)
    model.set_submodule(NAME, layer(old.in_features, old.out_features))
    model.config.quantization_config = config or {"quant_method": method}
    return model


def refusal(model: nn.Module, **settings) -> str:
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError) as error:
        sparsify(model, SparseConfig(density=0.05, **settings))
    assert before == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert classes == {name: type(module) for name, module in model.named_modules()}
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", LAYERS)
def test_it_is_refused_by_name(method):
    model = model_of(method, LAYERS[method])
    expected = f"sparse.targets: {NAME} is quantised by {method}, whose weights cannot be trained; those in nf4"
    for targets in (None, "all-linear", ["v_proj"], ["*.self_attn.*"]):
        assert refusal(model, targets=targets).startswith(expected)
    in_full = refusal(model, targets=["q_proj"], modules_to_save=["*.1.self_attn"])
    assert in_full.startswith(f"sparse.modules_to_save: {NAME} is quantised by {method}")


def test_what_is_not_packed_can_be_trained(caplog):
    with caplog.at_level(logging.WARNING):
        for settings in ({"targets": ["q_proj"]}, {"targets": "all-linear", "exclude_modules": [NAME]}):
            assert sparsify(model_of("gptq", QuantLinear), SparseConfig(density=0.01, **settings)).sparsity.weights
        assert not caplog.messages
        weights = sparsify(model_of("gptq", QuantLinear), SparseConfig(targets="all")).sparsity.weights
    assert not [name for name in weights if name.startswith(NAME)]
    assert caplog.messages == [f"sparse.targets: all leaves out {NAME}, quantised by gptq, which cannot be trained"]


def test_an_object_of_transformers_names_the_method_too():
    assert dict(packed_modules(model_of("", HQQLinear, HqqConfig.__new__(HqqConfig)))) == {NAME: "an unknown method"}
    config = HqqConfig.__new__(HqqConfig)
    config.quant_method = "hqq"
    assert dict(packed_modules(model_of("", HQQLinear, config))) == {NAME: "hqq"}


def test_a_model_without_config_names_the_class():
    model = nn.Sequential(nn.Linear(16, 16), QuantLinear(16, 16))
    message = refusal(model, targets="all-linear")
    assert message.startswith("sparse.targets: 1 is quantised by QuantLinear, whose weights")


def test_float8_layers_are_refused():
    """Those of DeepSeek's checkpoints: linear layers whose weight is float8."""
    model = model_of("fp8", lambda columns, rows: FP8Linear(columns, rows, (8, 8)))
    message = refusal(model, targets="all-linear")
    assert message.startswith(f"sparse.targets: {NAME}.weight has dtype float8_e4m3fn: such quantised weights cannot")


@pytest.mark.parametrize("family", ["gpt2", "bert", "gpt_neox", "t5", "qwen2_moe"])
def test_ordinary_models_have_no_packed_modules(family):
    task = {"bert": "sequence-classification", "t5": "seq2seq-lm"}.get(family, "causal-lm")
    assert [*packed_modules(tiny(family, task))] == []
