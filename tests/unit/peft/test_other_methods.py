"""Adapters of other methods and sparse deltas on one model: refused with one sentence, and nothing has changed."""

import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_cases import CAUSAL, TOKENS, assert_same, fresh, in_peft, logits, reference, train
from torch import nn

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.adapters.switching import merge_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.peft import watch
from sparse_zero.model.sparsify import merge_and_unload, sparsify
from sparse_zero.peft import SparseZeroConfig
from sparse_zero.selection.config import SparseConfig

PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
WITH_PROMPTS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(**PROMPTS),
    "PREFIX_TUNING": peft.PrefixTuningConfig(**PROMPTS),
    "P_TUNING": peft.PromptEncoderConfig(**PROMPTS),
    "CARTRIDGE": peft.CartridgeConfig(**PROMPTS),
    "CPT": peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
}
"""Methods that PEFT gives no tuner."""

METHODS = {
    "LORA": peft.LoraConfig(target_modules=["v_proj"], r=2),
    "LORA and modules_to_save": peft.LoraConfig(target_modules=["v_proj"], r=2, modules_to_save=["norm"]),
    "LORA and tokens": peft.LoraConfig(target_modules=["v_proj"], r=2, trainable_token_indices=[3, 4]),
    "IA3": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "SHIRA": peft.ShiraConfig(target_modules=["v_proj"], r=1),
}


def config_of(method: str) -> peft.PeftConfig:
    """A configuration of any method of PEFT."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    offered = {
        "task_type": "CAUSAL_LM",
        "target_modules": ["v_proj"],
        "num_virtual_tokens": 2,
        "feedforward_modules": [],
        "total_step": 10,
        "cpt_token_ids": [1, 2],
        "cpt_mask": [1, 1],
        "cpt_tokens_type_mask": [1, 1],
    }
    if method == "ADAPTION_PROMPT":
        return kind(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    return kind(**{name: offered[name] for name in offered if name in inspect.signature(kind).parameters})


def snapshot(model: nn.Module) -> list:
    kinds = [(name, type(module).__name__) for name, module in model.named_modules()]
    return [kinds, [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("add", [peft.get_peft_model, lambda model, config: model.add_adapter(config)])
def test_another_adapter_on_a_sparse_model(bases, method, add: Callable):
    """It would freeze the deltas, and its save_pretrained leaves them out."""
    model = reference(bases["llama"])
    expected, before = logits(model), snapshot(model)
    with pytest.raises(UserError, match="Model of PEFT on a sparse model would freeze its deltas"):
        add(model, METHODS[method])
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")
    assert_same(model, expected)
    train(model, 1)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("contained", [False, True], ids=["the model", "a model in it"])
def test_every_method_of_peft_is_refused_on_a_sparse_model(bases, contained):
    """Also those that have no tuner (trained prompts), and those whose own checks came first (AdaLoRA, GLoRA)."""
    sparse = reference(bases["llama"])
    model = nn.Sequential(sparse) if contained else sparse
    expected, before = logits(sparse), snapshot(sparse)
    methods = [method for method in PEFT_TYPE_TO_CONFIG_MAPPING if method != "SPARSE_ZERO"]
    assert len(methods) >= 45
    for method in methods:
        config = config_of(method)
        if contained:
            config.task_type = None if not config.is_prompt_learning else config.task_type
        with pytest.raises(UserError, match=r"of PEFT on a sparse model would freeze its deltas"):
            peft.get_peft_model(model, config)
        assert snapshot(sparse) == before, method
    assert_same(sparse, expected)
    train(sparse, 1)
    assert not torch.equal(logits(sparse), expected)


def test_adapters_of_other_methods_are_refused_when_they_are_loaded(tmp_path, bases):
    peft.get_peft_model(fresh(bases["llama"]), METHODS["LORA"]).save_pretrained(tmp_path / "lora")
    peft.get_peft_model(fresh(bases["llama"]), WITH_PROMPTS["PROMPT_TUNING"]).save_pretrained(tmp_path / "prompts")
    model = reference(bases["llama"])
    for directory in ("lora", "prompts"):
        with pytest.raises(UserError, match="of PEFT on a sparse model would freeze its deltas"):
            peft.PeftModel.from_pretrained(model, tmp_path / directory)
    with pytest.raises(UserError, match="of PEFT on a sparse model would freeze its deltas"):
        model.load_adapter(str(tmp_path / "lora"))
    assert not hasattr(model, "peft_config")
    assert not model._hf_peft_config_loaded
    with pytest.raises(UserError, match="MixedModel of PEFT on a sparse model would freeze its deltas"):
        peft.get_peft_model(model, METHODS["LORA"], mixed=True)


def test_a_copy_that_another_process_unpickles(bases, monkeypatch):
    """It has not called sparsify."""
    pickled = pickle.dumps(reference(bases["llama"]))
    monkeypatch.setattr(torch.nn.modules.module, "_global_module_registration_hooks", OrderedDict())
    watch.cache_clear()
    with pytest.raises(UserError, match="PROMPT_TUNING of PEFT on a sparse model would freeze its deltas"):
        peft.get_peft_model(pickle.loads(pickled), WITH_PROMPTS["PROMPT_TUNING"])
    watch.cache_clear()


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


@pytest.mark.parametrize("method", WITH_PROMPTS)
def test_sparsify_of_a_model_with_trained_prompts(tmp_path, bases, caplog, method):
    """The PeftModel would not save the deltas. Its base model alone can be made sparse, with a warning: each of the
    two saves its part."""
    model = peft.get_peft_model(fresh(bases["llama"]), WITH_PROMPTS[method])
    with pytest.raises(UserError, match="the model is a PeftModel"):
        sparsify(model, SparseConfig(density=0.05))
    base = sparsify(model.get_base_model(), SparseConfig(density=0.05, targets="all-linear"))
    assert f"a PeftModel with {method}, whose save_pretrained leaves out the deltas" in caplog.text
    wanted = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == {"prompt_encoder", "base_model"}
    train(model)
    save_adapter(base, tmp_path / "deltas")
    model.save_pretrained(tmp_path / "prompts")
    loaded = peft.PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path / "prompts")
    load_adapter(loaded.get_base_model(), tmp_path / "deltas")
    assert_same(loaded.eval(), logits(model.eval()))


def test_no_warning_without_prompts(bases, caplog):
    sparsify(fresh(bases["llama"]).requires_grad_(False), SparseConfig(density=0.05))
    reference(bases["llama"])
    assert "PeftModel" not in caplog.text


def test_sparsify_of_a_model_with_adaption_prompts_or_a_copied_head(bases):
    """Layers that are none of a tuner."""
    base = fresh(bases["llama"])
    peft.get_peft_model(base, config_of("ADAPTION_PROMPT"))
    with pytest.raises(UserError, match=r"has an adapter of PEFT \(AdaptedAttention\), which would be frozen"):
        sparsify(base, SparseConfig(density=0.05))
    base = fresh(bases["bert"])
    peft.get_peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(UserError, match=r"has an adapter of PEFT \(ModulesToSaveWrapper\), which would be frozen"):
        sparsify(base, SparseConfig(density=0.05))


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
