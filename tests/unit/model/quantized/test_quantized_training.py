"""Training scalars of a quantised weight is training those of the dequantised weight in an ordinary model, and nothing
is written into the packed weight."""

import logging

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import KINDS, batch, dense_like, load
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainingArguments

from sparse_zero import (
    SparseConfig,
    SparseTrainer,
    UserError,
    disable_adapter,
    merge_and_unload,
    set_scale,
    sparsify,
    unload,
)
from sparse_zero.quantized.formats import quantized_layers

WAYS = {
    "columns": {"columns": "whole"},
    "share": {"columns": 0.25},
    "scattered": {},
    "strips": {"granularity": 4},
    "regenerated": {"columns": 0.25, "indices": "regenerated"},
}


WAYS_OF_TORCHAO = ("columns", "share", "scattered")


def sparse(model, way: str = "columns", **settings):
    return sparsify(model, SparseConfig(targets="all-linear", density=0.03, **WAYS[way] | settings))


def packed_bytes(model) -> dict[str, torch.Tensor]:
    return {name: layer.packed.clone() for name, layer in quantized_layers(model)}


CASES = [(kind, way) for kind in KINDS for way in WAYS if "only" not in kind or way in WAYS_OF_TORCHAO]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_three_steps_are_those_of_the_dense_model(base, kind, way):
    """Against plain torch: the dense gradient of the dequantised weight, read at the positions."""
    model = load(base, kind)
    dense, data = dense_like(base, model), batch()
    logits = model(**data).logits
    sparse(model, way)
    before, weights = packed_bytes(model), model.sparsity.weights
    assert torch.equal(model(**data).logits, logits), "the outputs do not change"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        loss, expected = model(**data).loss, dense(**data).loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        dense.zero_grad()
        loss.backward()
        expected.backward()
        for name, weight in weights.items():
            parameter, at = dense.get_parameter(name), weight.flat_positions()
            gradient = parameter.grad.flatten()[at]
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(weight.delta.grad, gradient, rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                parameter.view(-1)[at] -= 0.3 * gradient
        optimizer.step()
    after = packed_bytes(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any("weight_base" in name for name, _ in model.named_buffers())
    unload(model)
    assert type(model.model.layers[0].mlp.up_proj) is type(load(base, kind).model.layers[0].mlp.up_proj)
    assert torch.equal(model(**data).logits, logits)


def test_gradients_of_the_input_and_of_a_bias(base):
    """A layer alone, with a trained bias: PEFT's wrapper of a quantised layer has none of it."""
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(32, 24, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight.data = torch.randn(24, 32)
    layer = layer.to("cpu")
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    model = torch.nn.Sequential(layer)
    sparsify(model, SparseConfig(targets="all-linear", density=0.2, columns="whole"))
    delta, columns = model.sparsity.weights["0.weight"].delta, model.sparsity.weights["0.weight"].columns
    with torch.no_grad():
        delta.normal_()
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 32, requires_grad=True)
    plain = [tensor.detach().clone().requires_grad_() for tensor in (x, delta, layer.bias)]
    count = delta.numel() // 24
    expected = F.linear(plain[0], weight, plain[2]) + plain[0][..., columns[:count]] @ plain[1].view(24, count).T
    output = model(x)
    torch.testing.assert_close(output, expected)
    seed = torch.randn_like(output)
    output.backward(seed)
    expected.backward(seed)
    for ours, theirs in zip((x, delta, layer.bias), plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_bias_is_selected_too(half_base):
    """`all` selects scalars of vectors as well. bitsandbytes converts the bias of its layers to the dtype of the
    product when they first run."""
    model = load(half_base, "nf4", torch.bfloat16)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            bias = torch.zeros(module.out_features, dtype=torch.bfloat16)
            module.bias = torch.nn.Parameter(bias, requires_grad=False)
    sparsify(model, SparseConfig(targets="all", density=0.05))
    weights = model.sparsity.weights
    optimizer = torch.optim.SGD([weight.delta for weight in weights.values()], lr=0.5)
    for _ in range(2):
        model(**batch()).loss.backward()
        optimizer.step()
    name = "model.layers.0.mlp.up_proj.bias"
    assert weights[name].delta.grad.abs().max() > 0
    bias = model.get_parameter(name).detach()
    torch.testing.assert_close(bias[weights[name].flat_positions()], weights[name].delta.detach())
    assert bias.abs().max() > 0


@pytest.mark.parametrize("way", ["columns", "scattered"])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_compute_dtypes(half_base, compute, way):
    """A model in bfloat16, within the rounding of bfloat16 of the dense model in float32."""
    model = load(half_base, "nf4-double", torch.bfloat16, bnb_4bit_compute_dtype=compute)
    data = batch()
    frozen = model(**data).logits
    sparse(model, way)
    assert torch.equal(model(**data).logits, frozen)
    torch.manual_seed(0)
    dense = load(half_base, "nf4-double", torch.bfloat16).dequantize(torch.float32).float().train()
    for name, weight in model.sparsity.weights.items():
        with torch.no_grad():
            weight.delta.normal_(std=0.2)
            dense.get_parameter(name).view(-1)[weight.flat_positions()] += weight.delta
    output, expected = model(**data), dense(**data)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), expected.logits, rtol=0.05, atol=0.1)
    assert (expected.logits - frozen.float()).abs().max() > 0.8, "the deltas matter"
    output.loss.backward()
    expected.loss.backward()
    for name, weight in model.sparsity.weights.items():
        dense_gradient = dense.get_parameter(name).grad.flatten()[weight.flat_positions()]
        assert F.cosine_similarity(weight.delta.grad, dense_gradient, 0) > 0.99


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "int8_weight_only"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_autocast(base, kind, reentrant):
    losses, gradients = [], []
    for checkpoints in (False, True):
        model = sparse(load(base, kind))
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([weight.delta.grad for weight in model.sparsity.weights.values()])
    assert losses[0] == losses[1]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0


def saved_bytes(model, data) -> int:
    """What a forward saves for its backward, without the parameters; each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.model.enable_input_require_grads()
    parameters = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**data).loss.backward()
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_a_step_keeps_what_the_frozen_quantised_model_keeps(tmp_path):
    """At most 1.05 of it with whole columns, although backward needs the inputs of all layers at these columns."""
    from quantized_cases import SIZES, save_base

    save_base(tmp_path, **SIZES | {"hidden_size": 128, "intermediate_size": 256})
    data = batch(4, 16)
    frozen = load(tmp_path, "nf4")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    before = saved_bytes(frozen, data)
    model = sparsify(load(tmp_path, "nf4"), SparseConfig(targets="all-linear", density=0.01, columns="whole"))
    assert before < saved_bytes(model, data) <= 1.05 * before
    scattered = sparsify(load(tmp_path, "nf4"), SparseConfig(targets="all-linear", density=0.01))
    assert saved_bytes(scattered, data) > 1.05 * before, "the measure sees an input that is kept"


class _Dequantised(TorchDispatchMode):
    """The sizes of the dequantised copies that are made, in scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if "dequantize_4bit" in str(func):
            self.made.append(result.numel())
        return result


def test_a_layer_is_dequantised_twice_in_a_step(base):
    """Once for its product and once for its backward, and never more than one layer."""
    model = sparse(load(base, "nf4"), "scattered")
    model.enable_input_require_grads()
    layers = [layer.shape.numel() for _, layer in quantized_layers(model)]
    with _Dequantised() as seen:
        model(**batch()).loss.backward()
    assert sorted(seen.made) == sorted(layers * 2)


@pytest.mark.parametrize("kind", ["nf4", "int8_weight_only"])
def test_dropout_scale_and_disable(base, kind):
    """The mask of a step is that of an unquantised model with the same selection, as are scale and disabling."""
    data, quantized = batch(), load(base, kind)
    dense = dense_like(base, quantized)
    frozen = quantized(**data).logits
    sparse(quantized, dropout=0.5)
    sparse(dense, dropout=0.5)
    torch.manual_seed(0)
    for name, weight in quantized.sparsity.weights.items():
        with torch.no_grad():
            weight.delta.normal_(std=0.1)
            dense.sparsity.weights[name].delta.copy_(weight.delta)
    for scale in (1.0, 0.5):
        set_scale(quantized, scale)
        set_scale(dense, scale)
        for train in (True, False):
            output, expected = (model.train(train)(**data) for model in (quantized, dense))
            torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        output, expected = (model.train()(**data) for model in (quantized, dense))
        output.loss.backward()
        expected.loss.backward()
        for name, weight in quantized.sparsity.weights.items():
            torch.testing.assert_close(
                weight.delta.grad, dense.sparsity.weights[name].delta.grad, rtol=1e-3, atol=1e-5
            )
    with disable_adapter(quantized):
        assert torch.equal(quantized(**data).logits, frozen)
    assert not torch.allclose(quantized(**data).logits, frozen, atol=1e-2)


def test_what_is_refused(base):
    model = sparse(load(base, "nf4"))
    name = "model.layers.0.self_attn.q_proj.weight"
    loss = model(**batch()).loss
    with torch.no_grad():
        model.sparsity.weights[name].delta.add_(1)
    with pytest.raises(UserError, match="deltas have changed between a forward and the backward"):
        loss.backward()
    with pytest.raises(UserError, match="is quantised, and cannot get another weight"):
        model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(32, 32))
    loss = model(**batch()).loss
    (gradient,) = torch.autograd.grad(loss, [model.sparsity.weights[name].delta], retain_graph=True)
    assert gradient.abs().max() > 0
    with pytest.raises(UserError, match="second derivatives"):
        torch.autograd.grad(loss, [model.sparsity.weights[name].delta], create_graph=True)
    loss = model(**batch()).loss
    unload(model)
    with pytest.raises(UserError, match="merged or unloaded between"):
        loss.backward()
    with pytest.raises(UserError, match="cannot be compiled"):
        torch.compile(sparse(load(base, "nf4")), backend="eager")(**batch())
    with pytest.raises(
        UserError, match=r"q_proj\.weight is a Params4bit of bitsandbytes: such quantised weights cannot"
    ):
        sparsify(load(base, "nf4"), SparseConfig(density=0.1, modules_to_save=["*.0.self_attn.q_proj"]))
    stored = sparsify(load(base, "fp4"), SparseConfig(targets=["q_proj"], density=0.01))
    stored.model.layers[0].mlp.up_proj.weight.data = torch.zeros(1024, 1, dtype=torch.float16)
    with pytest.raises(UserError, match=r"stored as torch\.bfloat16 and were converted to torch\.float16"):
        stored(**batch())


@pytest.mark.parametrize("selection", ["gradient", "snip"])
def test_selection_by_gradients_is_refused(base, selection):
    model = load(base, "nf4")
    config = SparseConfig(targets="all-linear", density=0.03, selection=selection)
    with pytest.raises(UserError, match=r"proj\.weight.*gradients of quantised weights are not computed"):
        sparsify(model, config, batches=[batch()])


def test_an_evaluation_does_not_repack(base):
    """bitsandbytes' first evaluation on a CPU with bfloat16 instructions repacks a layer and rounds its statistics;
    trained afterwards, it has no gradient for its input."""
    model = load(base, "nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as after an evaluation
    with pytest.raises(UserError, match="repacked the model's 4-bit weights"):
        sparse(model)
    layer.weight.quant_state.packing_format_for_cpu = False
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    sparse(model)
    before = packed_bytes(model)
    with torch.no_grad():
        model.eval()(**batch())
    after = packed_bytes(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.train()(**batch()).loss.backward()
    assert all(weight.delta.grad.abs().max() > 0 for weight in model.sparsity.weights.values())


@pytest.mark.parametrize("selection", ["magnitude", "bernoulli"])
def test_other_selections(base, selection):
    model = load(base, "nf4")
    values = {name: layer.dequantized().flatten() for name, layer in quantized_layers(model)}
    sparsify(model, SparseConfig(targets="all-linear", density=0.03, selection=selection))
    for name, weight in model.sparsity.weights.items():
        at = weight.flat_positions()
        if selection == "magnitude":
            smallest = values[name][at].abs().min()
            assert (values[name].abs() > smallest).sum() <= at.numel()
    model(**batch()).loss.backward()
    assert all(weight.delta.grad.abs().max() > 0 for weight in model.sparsity.weights.values())


def test_norms_and_heads_are_selected_as_before(base, caplog):
    """What is not quantised is an ordinary selected parameter."""
    caplog.set_level(logging.WARNING)
    model = load(base, "int8")
    sparsify(model, SparseConfig(targets=["lm_head", "q_proj", "model.norm"], density=0.05))
    weights = model.sparsity.weights
    assert [weight.is_packed for weight in weights.values()] == [True, True, False, False]
    model(**batch()).loss.backward()
    assert all(weight.delta.grad is not None for weight in weights.values())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_what_torchao_quantises_itself(base, targets):
    """A model on which `quantize_` was called, which no config of transformers knows."""
    from torchao.quantization import Int8WeightOnlyConfig, PerTensor, quantize_

    model, data = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), batch()
    quantize_(model.model, Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False))
    frozen = model(**data).logits
    sparsify(model, SparseConfig(targets=targets, density=0.03))
    assert {layer.kind for _, layer in quantized_layers(model)} == {"int8_weight_only-tensor"}
    assert torch.equal(model(**data).logits, frozen)
    model(**data).loss.backward()
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            assert weight.delta.grad.abs().max() > 0
            weight.delta.normal_(std=0.1)
    adapted = model(**data).logits
    assert not torch.allclose(adapted, frozen, atol=1e-2)
    torch.testing.assert_close(merge_and_unload(model)(**data).logits, adapted, rtol=1e-4, atol=1e-4)
    assert type(model.model.layers[0].mlp.up_proj._parameters["weight"]) is torch.nn.Parameter


def test_what_is_refused_of_torchao(base, tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers.integrations import HfDeepSpeedConfig

    other = AutoModelForCausalLM.from_pretrained(base)
    quantize_(other.model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(UserError, match=r"proj\.weight is a Int8Tensor of torchao: such quantised weights cannot be"):
        sparse(other)
    model = load(base, "int8_weight_only")
    stage_3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert stage_3.is_zero3()
    with pytest.raises(UserError, match="ZeRO stage 3 cannot partition torchao's weights: use stage 2, or load"):
        sparse(model)
    del stage_3
    sparse(model)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    stage_3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="ZeRO stage 3 cannot partition torchao's weights"):
        SparseTrainer(model, arguments)
    del stage_3
