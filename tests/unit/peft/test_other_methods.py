"""Adapters of other methods and sparse deltas on one model: refused with one sentence, and nothing has changed."""

from collections.abc import Callable

import peft
import pytest
import torch
from peft_cases import CAUSAL, TOKENS, assert_same, fresh, in_peft, logits, reference, train
from torch import nn

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.adapters.switching import merge_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import merge_and_unload, sparsify
from sparse_zero.peft import SparseZeroConfig
from sparse_zero.selection.config import SparseConfig

METHODS = {
    "LORA": peft.LoraConfig(target_modules=["v_proj"], r=2),
    "LORA and modules_to_save": peft.LoraConfig(target_modules=["v_proj"], r=2, modules_to_save=["norm"]),
    "LORA and tokens": peft.LoraConfig(target_modules=["v_proj"], r=2, trainable_token_indices=[3, 4]),
    "IA3": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "SHIRA": peft.ShiraConfig(target_modules=["v_proj"], r=1),
}


def snapshot(model: nn.Module) -> list:
    kinds = [(name, type(module).__name__) for name, module in model.named_modules()]
    return [kinds, [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("add", [peft.get_peft_model, lambda model, config: model.add_adapter(config)])
def test_another_adapter_on_a_sparse_model(bases, method, add: Callable):
    """It would freeze the deltas, and its save_pretrained leaves them out."""
    model = reference(bases["llama"])
    expected, before = logits(model), snapshot(model)
    with pytest.raises(UserError, match=f"{method.split()[0]} of PEFT on a sparse model would freeze its deltas"):
        add(model, METHODS[method])
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")
    assert_same(model, expected)
    train(model, 1)
    assert not torch.equal(logits(model), expected)


def test_after_merging_it_is_allowed(tmp_path, bases):
    model = merge_and_unload(reference(bases["llama"]))
    expected = logits(model)
    lora = peft.get_peft_model(model, METHODS["LORA"])
    assert_same(lora, expected)


@pytest.mark.parametrize("method", METHODS)
def test_sparsify_of_a_model_with_another_adapter(tmp_path, bases, method):
    """It would freeze the other adapter."""
    model = peft.get_peft_model(fresh(bases["llama"]), METHODS[method])
    expected, before = logits(model.eval()), snapshot(model)
    with pytest.raises(UserError, match="the model is a PeftModel, whose save_pretrained would leave out the deltas"):
        sparsify(model, SparseConfig(density=0.05))
    with pytest.raises(UserError, match=r"has an adapter of PEFT .*, which would be frozen"):
        sparsify(model.get_base_model(), SparseConfig(density=0.05))
    save_adapter(reference(bases["llama"]), tmp_path)
    with pytest.raises(UserError, match=r"has an adapter of PEFT .*, which would be frozen"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    assert_same(model, expected)


def test_sparsify_of_a_model_with_trained_prompts(bases):
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(fresh(bases["llama"]), prompts)
    with pytest.raises(UserError, match="the model is a PeftModel"):
        sparsify(model, SparseConfig(density=0.05))


def test_a_sparse_model_gets_no_second_adapter(bases):
    """Of which PEFT would know one only."""
    model = reference(bases["llama"])
    expected = logits(model)
    with pytest.raises(UserError, match="this model is sparse already"):
        peft.get_peft_model(model, SparseZeroConfig(**CAUSAL))
    assert_same(model, expected)
    merge_adapter(model)
    with pytest.raises(UserError, match="'default' is merged"):
        peft.get_peft_model(model, SparseZeroConfig(**CAUSAL))


def test_our_adapters_do_not_mix_with_others(bases):
    model = in_peft(bases["llama"])
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", METHODS["LORA"])
    assert list(model.peft_config) == ["default"]
    with pytest.raises(UserError, match="2 adapters; a sparse model has one active adapter"):
        model.base_model.set_adapter(["default", "other"])
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"densty": 0.1}, "unknown setting 'densty'; did you mean 'density'?"),
        ({"target_modules": ["v_proj"]}, "unknown setting 'target_modules'; it is called 'targets' here"),
        ({"density": 2.0}, "SparseZeroConfig: density: Input should be less than or equal to 1"),
        ({"density": 0.1, "sparsity": 0.9}, "density and sparsity exclude each other"),
    ],
)
def test_a_wrong_setting(settings, expected):
    with pytest.raises(UserError) as error:
        SparseZeroConfig(**settings)
    assert expected in str(error.value)


def test_all_settings_of_sparse_config_are_attributes():
    config = SparseZeroConfig(density=0.1, task_type="CAUSAL_LM")
    assert {name: getattr(config, name) for name in SparseConfig.model_fields} == config.sparse.model_dump()
    config.density = 0.2
    assert config.sparse == SparseConfig(density=0.2)
    assert config == SparseZeroConfig(**config.to_dict())
    assert config != SparseZeroConfig(density=0.3)
