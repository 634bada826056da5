"""What goes in and out of a sparse model with a quantised base: state dicts, copies, adapters, the reference."""

import copy
import io
import json
import logging
import weakref

import pytest
import torch
from quantized_cases import batch, load
from transformers import AutoModelForCausalLM

from sparse_zero import (
    SparseConfig,
    UserError,
    disable_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    sparsify,
    unload,
)
from sparse_zero.model.reference import keep_reference, reference_values

KINDS = ["nf4-double", "int8", "int8_weight_only"]


def trained(model, seed: int = 1, **settings):
    settings = {"targets": "all-linear", "density": 0.03, "columns": "whole"} | settings
    sparsify(model, SparseConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.copy_(torch.randn(weight.delta.shape, generator=generator) * 0.1)
    return model


def plain(tensor):
    """The integers of torchao's tensors, which cannot be compared themselves."""
    return getattr(tensor, "qdata", tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(base, kind):
    """It has the packed weights once, as bitsandbytes saves them, and loads into a model with the same base only."""
    data, model = batch(), trained(load(base, kind))
    state, frozen = model.state_dict(), load(base, kind).state_dict()
    added = {key for key in state if key.rpartition("_")[2] in ("delta", "positions")}
    assert {*state} - added == {*frozen}
    assert all(torch.equal(plain(state[key]), plain(frozen[key])) for key in frozen)
    other = trained(load(base, kind), seed=2)
    expected = model(**data).logits
    assert not torch.allclose(other(**data).logits, expected, atol=1e-2)
    assert other.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(other(**data).logits, expected)
    with torch.no_grad():
        for weight in other.sparsity.weights.values():
            weight.delta.zero_()
    other.load_state_dict({key: value for key, value in state.items() if key.endswith("_delta")}, strict=False)
    assert torch.equal(other(**data).logits, expected)
    with pytest.raises(RuntimeError, match="has another quantised base, or none"):
        trained(load(base, "nf4")).load_state_dict(state)
    with pytest.raises(RuntimeError, match="saved with another selection"):
        trained(load(base, kind), density=0.06).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(base, kind):
    data, model = batch(), trained(load(base, kind))
    logits = model(**data).logits
    copies = [copy.deepcopy(model)]
    if kind != "int8_weight_only":  # torchao gives its modules functions that cannot be pickled
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert torch.equal(other(**data).logits, logits)
        with torch.no_grad():
            for weight in other.sparsity.weights.values():
                weight.delta.mul_(2)
        assert not torch.equal(other(**data).logits, logits)
        assert torch.equal(model(**data).logits, logits)
        other(**data).loss.backward()
        assert all(weight.delta.grad.abs().max() > 0 for weight in other.sparsity.weights.values())


def test_a_layer_alone():
    """The model is the quantised layer itself."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(32, 24, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model, x = trained(layer, targets=["weight"]), torch.randn(3, 32)
    output = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), output)
    assert other.load_state_dict(model.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    with disable_adapter(other):
        assert not torch.allclose(other(x), output, atol=1e-3)
    assert torch.equal(other(x), output)


def test_a_backward_sees_its_own_forward(base):
    """A forward within disable_adapter or with another adapter between a forward and its backward, as in DPO."""
    data, model = batch(), trained(load(base, "nf4"))
    model(**data).loss.backward()
    expected = {name: weight.delta.grad.clone() for name, weight in model.sparsity.weights.items()}
    for weight in model.sparsity.weights.values():
        weight.delta.grad = None
    loss = model(**data).loss
    with disable_adapter(model), torch.no_grad():
        model(**data)
    loss.backward()
    for name, weight in model.sparsity.weights.items():
        assert torch.equal(weight.delta.grad, expected[name])


def test_the_reference_of_an_adapter_is_what_it_was(base):
    data, model = batch(), trained(load(base, "nf4"))
    frozen = load(base, "nf4")(**data).logits
    before = model(**data).logits
    assert keep_reference(model)
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.mul_(3)
    with reference_values(model):
        assert torch.equal(model(**data).logits, before)
    with disable_adapter(model):
        assert torch.equal(model(**data).logits, frozen)
    assert not torch.allclose(model(**data).logits, before, atol=1e-2)
    fresh = trained(load(base, "nf4"))
    with torch.no_grad():
        for weight in fresh.sparsity.weights.values():
            weight.delta.zero_()
    assert not keep_reference(fresh)


@pytest.mark.parametrize("kind", ["nf4-double", "int8_weight_only"])
def test_adapters_are_saved_loaded_and_switched(base, tmp_path, kind):
    data, model = batch(), trained(load(base, kind))
    one, frozen = model(**data).logits, load(base, kind)(**data).logits
    save_adapter(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert {*config["quantized"]} == {kind}
    assert {*config["quantized"][kind]} == {*config["tensors"]}
    assert config["dtype"] == "float32"
    two_model = trained(load(base, kind), seed=2, columns=1)
    two = two_model(**data).logits
    save_adapter(two_model, tmp_path / "two")
    fresh = load_adapter(load(base, kind), tmp_path / "one")
    assert torch.equal(fresh(**data).logits, one)
    load_adapter(fresh, tmp_path / "two", adapter_name="two")
    loss = fresh(**data).loss
    set_adapter(fresh, "two")
    assert torch.equal(fresh(**data).logits, two)
    with disable_adapter(fresh):
        assert torch.equal(fresh(**data).logits, frozen)
    loss.backward()  # of the other adapter
    set_adapter(fresh, "default")
    assert all(weight.delta.grad.abs().max() > 0 for weight in fresh.sparsity.weights.values())
    assert torch.equal(fresh(**data).logits, one)
    with pytest.raises(UserError, match="is quantised, and nothing is written into it: merge_and_unload"):
        merge_adapter(fresh)
    assert torch.equal(fresh(**data).logits, one)


@pytest.mark.parametrize(("trained_on", "loaded_on"), [("nf4", None), (None, "nf4"), ("nf4", "int8_weight_only")])
def test_another_quantisation_of_the_base_is_said_once(base, tmp_path, caplog, trained_on, loaded_on):
    def model(kind):
        return load(base, kind) if kind else AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()

    save_adapter(trained(model(trained_on)), tmp_path)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    other = load_adapter(model(loaded_on), tmp_path)
    names = {None: "that is not quantised", "nf4": "in nf4", "int8_weight_only": "in int8_weight_only"}
    (said,) = [record.message for record in caplog.records if "quantisation" in record.message]
    assert f"was trained on a base model {names[trained_on]}, and is loaded on one {names[loaded_on]}" in said
    other(**batch()).loss.backward()


@pytest.mark.parametrize("kind", ["nf4", "int8_weight_only"])
def test_another_base_is_refused(base, tmp_path, kind):
    """The fingerprint is of the packed bytes: it sees another base in the same quantisation."""
    save_adapter(trained(load(base, kind)), tmp_path)
    other = load(base, kind)
    weight = other.model.layers[1].mlp.down_proj.weight
    values = plain(weight).data
    values.copy_(values.flip(0))
    with pytest.raises(UserError, match=r"different weights: 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        load_adapter(other, tmp_path)


def test_the_storage_dtype_does_not_matter(base, tmp_path):
    model = trained(load(base, "nf4"))
    logits = model(**batch()).logits
    save_adapter(model, tmp_path)
    other = load(base, "nf4", bnb_4bit_quant_storage=torch.float32)
    assert torch.equal(load_adapter(other, tmp_path)(**batch()).logits, logits)


def test_a_model_of_torchao_is_moved_while_others_refer_to_its_weights(base):
    """As DeepSpeed does, which has a weak reference to each parameter. torch would exchange the contents of a tensor
    subclass with those of another, which it refuses then."""
    data, model = batch(), trained(load(base, "int8_weight_only"), targets=["q_proj"])
    plain_layer = load(base, "int8_weight_only").model.layers[0].mlp.up_proj
    references = [weakref.ref(parameter) for parameter in (*model.parameters(), plain_layer.weight)]
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        plain_layer.to("cpu")
    logits, names = model(**data).logits, [name for name, _ in model.named_parameters()]
    model.to("cpu")
    assert all(reference() is not None for reference in references), "nothing has changed, and nothing was replaced"
    assert torch.equal(model(**data).logits, logits)
    model.to(torch.bfloat16)
    assert [name for name, _ in model.named_parameters()] == names
    half = model(**data)
    torch.testing.assert_close(half.logits.float(), logits, rtol=0.05, atol=0.1)
    half.loss.backward()
    assert all(weight.delta.grad.abs().max() > 0 for weight in model.sparsity.weights.values())
    with pytest.raises(ZeroDivisionError):
        model._apply(lambda tensor: 1 / 0)
    assert torch.equal(model(**data).logits, half.logits), "as it was"
    ignored = {*model._ddp_params_and_buffers_to_ignore}
    assert {name for name in names if "proj.weight" in name and "delta" not in name} <= ignored
    assert not hasattr(unload(model), "_ddp_params_and_buffers_to_ignore")
