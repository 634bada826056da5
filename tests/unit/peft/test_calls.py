"""PEFT's calls on one model: train, disable, switch, merge, delete, copy. The reference is `sparsify` without PEFT."""

import copy
import pickle

import peft
import pytest
import torch
from peft_cases import (
    CAUSAL,
    TOKENS,
    assert_differs,
    assert_same,
    families,
    fresh,
    in_peft,
    logits,
    reference,
    train,
    trained,
)
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.peft import SparseZeroConfig
from sparse_zero.peft.layer import layer_of


@families
def test_training_is_that_of_sparsify(bases, family):
    model = trained(bases[family])
    assert_same(model, logits(reference(bases[family])))
    assert_differs(model, logits(fresh(bases[family])))


def test_print_trainable_parameters(bases, capsys):
    model = in_peft(bases["llama"], density=0.05)
    model.print_trainable_parameters()
    base = sum(p.numel() for p in fresh(bases["llama"]).parameters())
    trainable = round(0.05 * base)
    assert f"trainable params: {trainable:,d} || all params: {base + trainable:,d}" in capsys.readouterr().out


def test_the_status_of_the_model(bases):
    model = in_peft(bases["llama"])
    model.add_adapter("other", SparseZeroConfig(**CAUSAL | {"seed": 5}))
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False}
    assert (status.enabled, status.merged_adapters) == (True, [])
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


@families
def test_disable_adapter_gives_the_base_model(bases, family):
    model, base = trained(bases[family]), logits(fresh(bases[family]))
    expected = logits(model)
    with model.disable_adapter():
        assert_same(model, base)
        with model.disable_adapter():
            assert_same(model, base)
        assert_same(model, base)
    assert_same(model, expected)
    model.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    assert_same(model, base)
    model.base_model.enable_adapter_layers()
    assert_same(model, expected)


def test_several_adapters(bases):
    base = logits(fresh(bases["llama"]))
    model = trained(bases["llama"])
    first = logits(model)
    settings = {"seed": 7, "density": 0.1}
    model.add_adapter("second", SparseZeroConfig(**CAUSAL | settings))
    assert_same(model, first)
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    assert_same(model, base)
    train(model)
    second = logits(model)
    assert torch.equal(second, logits(reference(bases["llama"], **settings)))
    for name, expected in (("default", first), ("second", second), ("default", first)):
        model.set_adapter(name)
        assert_same(model, expected)


def test_an_adapter_for_each_row_is_refused(bases):
    """PEFT passes on the names only to methods that know them; the active adapter would answer for all."""
    model = in_peft(bases["llama"]).eval()
    for call in (model, model.generate):
        with pytest.raises(UserError, match=r"adapter_names: .* call set_adapter\(name\)"):
            call(input_ids=TOKENS, adapter_names=["default", "__base__"])
    assert_same(model, logits(fresh(bases["llama"])))


def test_an_optimizer_stays_valid_when_adapters_are_switched(bases):
    """As in PEFT, whose adapters' parameters stay the same objects."""
    model = in_peft(bases["llama"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.add_adapter("second", SparseZeroConfig(**CAUSAL | {"seed": 7}))
    model.set_adapter("second")
    model.set_adapter("default")
    before = logits(model)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    assert_differs(model, before)


def test_delete_adapter(bases):
    model = trained(bases["llama"])
    expected = logits(model)
    for name in ("a", "b"):
        model.add_adapter(name, SparseZeroConfig(**CAUSAL | {"seed": 7}))
    model.delete_adapter("a")
    assert_same(model, expected)
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="'b' was active and is deleted: 'default' is active now"):
        model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"
    assert_same(model, expected)
    model.delete_adapter("default")
    assert_same(model.base_model, logits(fresh(bases["llama"])))
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


@families
def test_merge_and_unmerge(bases, family):
    model, base = trained(bases[family]), fresh(bases[family])
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert_same(model, expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(model, logits(base))
    assert_same(model, expected)


@families
def test_merge_and_unload_gives_a_plain_model(bases, family):
    model, base = trained(bases[family]), fresh(bases[family])
    expected = logits(model)
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected)


@families
def test_unload_restores_the_base_model_bit_for_bit(bases, family):
    plain, base = trained(bases[family]).unload(), fresh(bases[family])
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    for name, tensor in base.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in base.parameters()]


def test_a_named_adapter_is_merged(bases):
    model = trained(bases["llama"])
    model.add_adapter("other", SparseZeroConfig(**CAUSAL | {"seed": 7}))
    with pytest.raises(UserError, match="only the active adapter can be merged"):
        model.merge_adapter(["other"])
    model.set_adapter("other")
    train(model)
    expected = logits(model)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["other"])), expected)


def test_values_that_are_not_finite_are_not_merged(bases):
    model = trained(bases["llama"])
    next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        model.merge_and_unload()
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(bases, twin_of):
    model = trained(bases["llama"])
    expected = logits(model)
    twin = twin_of(model)
    assert_same(twin, expected)
    assert layer_of(twin).model is twin.get_base_model()
    train(twin)
    assert_differs(twin, expected)
    assert_same(model, expected)
    with twin.disable_adapter():
        assert_same(twin, logits(fresh(bases["llama"])))
    assert_same(model, expected)


def test_a_state_dict_of_the_whole_model(bases):
    model, other = trained(bases["llama"]), in_peft(bases["llama"])
    other.load_state_dict(model.state_dict())
    assert_same(other, logits(model))


def test_requires_grad_and_inference_mode(bases):
    model = in_peft(bases["llama"])
    trainable = model.get_nb_trainable_parameters()[0]
    model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("default", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == trainable
    with model.disable_adapter():
        pass
    assert model.get_nb_trainable_parameters()[0] == trainable


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_modules_to_save_and_tokens_are_trained_in_full(bases, family):
    """PEFT adds the head of a classifier, whatever `modules_to_save` says."""
    names = ["norm"] if family == "llama" else ["pooler"]
    model = in_peft(bases[family], density=0.3, modules_to_save=names, trainable_token_indices={"embed": [4, 9]})
    whole = {name for name, p in model.get_base_model().named_parameters() if p.requires_grad and "delta" not in name}
    expected = {"llama": {"model.norm.weight"}, "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}}
    assert whole == expected[family] | ({"classifier.weight", "classifier.bias"} if family == "bert" else set())
    rows = {name: weight.selection.whole_rows for name, weight in model.get_base_model().sparsity.weights.items()}
    assert {name for name, whole_rows in rows.items() if whole_rows == (4, 9)} >= {
        "llama": {"model.embed_tokens.weight"},
        "bert": {"bert.embeddings.word_embeddings.weight"},
    }[family]


def test_a_model_of_other_libraries():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    expected = model(torch.ones(2, 6)).detach()
    sparse = peft.get_peft_model(model, SparseZeroConfig(density=0.3, targets="all-linear"))
    assert torch.equal(sparse(torch.ones(2, 6)), expected)
    sparse(torch.ones(2, 6)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in sparse.parameters() if p.requires_grad)


def test_inject_adapter_in_model(bases):
    model = fresh(bases["llama"])
    peft.inject_adapter_in_model(SparseZeroConfig(**CAUSAL), model)
    train(model)
    assert_same(model, logits(reference(bases["llama"])))


def test_the_calls_of_transformers(bases):
    """`PreTrainedModel.add_adapter` and others, without a PeftModel."""
    model, base = fresh(bases["llama"]), logits(fresh(bases["llama"]))
    model.add_adapter(SparseZeroConfig(**CAUSAL))
    train(model)
    expected = logits(model)
    model.add_adapter(SparseZeroConfig(**CAUSAL | {"seed": 9}), "other")
    assert model.active_adapters() == ["other"]
    assert_same(model, base)
    model.set_adapter("default")
    assert_same(model, expected)
    model.disable_adapters()
    assert_same(model, base)
    model.enable_adapters()
    assert_same(model, expected)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]


def test_generate(bases):
    model = trained(bases["llama"])
    tokens = model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False)
    expected = reference(bases["llama"]).generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, expected)
