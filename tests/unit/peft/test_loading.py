"""Adapters on disk: those that PEFT saved open without it, and the other way round; what does not fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import older_version
import peft
import pytest
import torch
from older_version import EXPECTED, make
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from peft_cases import (
    CAUSAL,
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
from transformers import AutoModelForCausalLM

from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.peft import SparseZeroConfig

AUTO = {"bert": AutoPeftModelForSequenceClassification}


@families
def test_saved_by_peft(tmp_path, bases, family):
    model = trained(bases[family])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_same(model, expected)
    assert_same(load_adapter(fresh(bases[family]), tmp_path), expected)
    assert_same(PeftModel.from_pretrained(fresh(bases[family]), tmp_path), expected)
    assert_same(PeftModel.from_pretrained(fresh(bases[family]), tmp_path, low_cpu_mem_usage=True), expected)
    auto = AUTO.get(family, AutoPeftModelForCausalLM).from_pretrained(tmp_path)
    assert_same(auto.eval(), expected)


@families
def test_saved_by_save_adapter(tmp_path, bases, family):
    model = reference(bases[family])
    expected = logits(model)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(fresh(bases[family]), tmp_path)
    assert_same(loaded, expected)
    assert not loaded.training
    assert loaded.get_nb_trainable_parameters()[0] == 0
    with loaded.disable_adapter():
        assert_same(loaded, logits(fresh(bases[family])))


@families
def test_both_write_the_same_files(tmp_path, bases, family):
    trained(bases[family]).save_pretrained(tmp_path / "peft")
    save_adapter(reference(bases[family]), tmp_path / "own")
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {p.name for p in (tmp_path / "own").iterdir()}
    one, other = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("peft", "own"))
    assert one["peft_type"] == "SPARSE_ZERO"
    if family == "bert":  # PEFT's name of the head is in its settings
        one["sparse"].pop("modules_to_save"), other["sparse"].pop("modules_to_save")
    assert one == other


def test_the_training_goes_on_after_loading(tmp_path, bases):
    trained(bases["llama"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path, is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == in_peft(bases["llama"]).get_nb_trainable_parameters()[0]
    before = logits(model)
    train(model, 1)
    assert_differs(model, before)


def test_all_adapters_are_saved(tmp_path, bases):
    """Also those that are inactive, merged, or loaded and never active."""
    model = trained(bases["llama"])
    expected = {"default": logits(model)}
    model.save_pretrained(tmp_path / "first")
    model.add_adapter("second", SparseZeroConfig(**CAUSAL | {"seed": 7}))
    model.set_adapter("second")
    train(model)
    expected["second"] = logits(model)
    model.load_adapter(tmp_path / "first", "third")
    expected["third"] = expected["default"]
    model.merge_adapter()
    model.save_pretrained(tmp_path / "all")
    for name, values in expected.items():
        directory = tmp_path / "all" / ("" if name == "default" else name)
        assert_same(PeftModel.from_pretrained(fresh(bases["llama"]), directory), values)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    assert_same(PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path / "one" / "second"), expected["second"])


def test_saving_within_disable_adapter(tmp_path, bases):
    model = trained(bases["bert"])
    expected = logits(model)
    with model.disable_adapter():
        model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(fresh(bases["bert"]), tmp_path), expected)


def test_several_adapters_are_loaded(tmp_path, bases):
    expected = {}
    for seed in (1, 2):
        model = trained(bases["llama"], seed=seed)
        expected[str(seed)] = logits(model)
        model.save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path / "1", adapter_name="1")
    model.load_adapter(tmp_path / "2", adapter_name="2")
    assert_same(model, expected["1"])
    for name in ("2", "1", "2"):
        model.set_adapter(name, inference_mode=True)
        assert_same(model, expected[name])
        assert model.get_nb_trainable_parameters()[0] == 0


def test_the_loaders_of_transformers(tmp_path, bases):
    model = trained(bases["qwen2"])
    model.save_pretrained(tmp_path)
    expected, base = logits(model), fresh(bases["qwen2"])
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    base.load_adapter(str(tmp_path))
    assert_same(base, expected)
    assert not any(p.requires_grad for p in base.parameters())
    base.load_adapter(str(tmp_path), adapter_name="again", is_trainable=True)
    base.set_adapter("again")
    assert_same(base, expected)
    base.save_pretrained(tmp_path / "saved")
    assert_same(load_adapter(fresh(bases["qwen2"]), tmp_path / "saved"), expected)
    with pytest.raises(UserError, match="has an adapter 'again'"):
        base.load_adapter(str(tmp_path), adapter_name="again")
    with pytest.raises((OSError, ValueError)):
        fresh(bases["qwen2"]).load_adapter(str(tmp_path / "nothing"))


def test_other_methods_load_as_before(tmp_path, bases):
    """Through the functions that are wrapped."""
    model = peft.get_peft_model(fresh(bases["llama"]), peft.LoraConfig(init_lora_weights=False))
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path)
    loaded.load_adapter(tmp_path, "default")
    assert_same(loaded, expected)
    plain = fresh(bases["llama"])
    plain.load_adapter(str(tmp_path))
    assert_same(plain, expected)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("name", [name for name in make.ADAPTERS if name != "tokens"])
def test_adapters_of_version_0_1(name):
    family, _ = make.ADAPTERS[name]
    model = PeftModel.from_pretrained(make.base_model(family), older_version.DIRECTORY / "adapters" / name)
    found = make.last_logits(model.get_base_model(), family, name)
    torch.testing.assert_close(found, EXPECTED["adapters"][name]["logits"], rtol=1e-4, atol=1e-5)


def test_values_are_loaded_into_an_adapter_that_exists(tmp_path, bases):
    """As transformers' Trainer does when it resumes, and for the best model."""
    model = trained(bases["llama"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    train(model)
    assert_differs(model, expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(model, expected)
    model.add_adapter("other", SparseZeroConfig(**CAUSAL))
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert_same(model, expected)


def test_values_for_other_positions_are_refused(tmp_path, bases):
    model, other = trained(bases["llama"]), trained(bases["llama"], seed=8)
    other.save_pretrained(tmp_path)
    expected = logits(model)
    with pytest.raises(UserError, match="the model has a different selection"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(UserError, match="belongs to another selection"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    with pytest.raises(UserError, match=r"positions' is in only one of the state dict.*load the adapter's directory"):
        set_peft_model_state_dict(model, load_peft_weights(str(tmp_path), device="cpu"))
    assert_same(model, expected)


@families
def test_the_state_dict_of_an_adapter(bases, family):
    model, other = trained(bases[family]), in_peft(bases[family])
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert_same(other, logits(model))
    other.add_adapter("second", SparseZeroConfig(**CAUSAL, task_type=model.peft_config["default"].task_type))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name="second")
    other.set_adapter("second")
    assert_same(other, logits(model))


@pytest.mark.parametrize("damage", ["base", "nan", "cut", "key"])
def test_what_does_not_fit_is_refused(tmp_path, bases, damage):
    model = trained(bases["llama"])
    if damage == "nan":
        next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")
    model.save_pretrained(tmp_path)
    base = fresh(bases["llama"])
    expected = {"base": "different weights", "nan": "NaN or infinite", "cut": "damaged", "key": "odd: Extra inputs"}
    if damage == "base":
        base.model.norm.weight.data += 1
    elif damage == "cut":
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "key":
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"odd": 1}))
    before = logits(base)
    with pytest.raises(UserError, match=expected[damage]):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)


def test_stored_positions(tmp_path, bases):
    model = trained(bases["llama"], selection="magnitude")
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path), logits(model))
    assert read_adapter(tmp_path).stored_positions


def test_a_configuration_that_was_read_first(tmp_path, bases):
    model = trained(bases["llama"])
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, SparseZeroConfig)
    assert config.base_model_name_or_path == str(bases["llama"])
    assert_same(PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path, config=config), logits(model))


def test_hotswap_is_for_lora_only(tmp_path, bases):
    model = trained(bases["llama"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA but SPARSE_ZERO"):
        hotswap_adapter(model, tmp_path, "default")


def test_an_adapter_of_the_hub(tmp_path, bases, monkeypatch):
    """All its files are downloaded, at the revision that was asked for."""
    model = trained(bases["llama"], selection="magnitude")
    model.save_pretrained(tmp_path / "local")
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options["revision"], set(options["allow_patterns"])))
        return str(tmp_path / "local")

    monkeypatch.setattr("sparse_zero.peft.config.snapshot_download", download)
    config = SparseZeroConfig.from_pretrained("user/adapter", revision="v1")
    files = {"adapter_config.json", "adapter_model.safetensors", "adapter_positions.safetensors", "README.md"}
    assert asked == [("user/adapter", "v1", files)]
    loaded = peft.get_peft_model(fresh(bases["llama"]), config)
    assert_same(loaded, logits(model))


NOT_REGISTERED = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, known = sys.argv[1:]
if known == "yes":
    import sparse_zero.peft
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    print("loaded")
except KeyError as error:
    print(error)
"""


@pytest.mark.parametrize(("known", "expected"), [("no", "'SPARSE_ZERO'"), ("yes", "loaded")])
def test_the_import_makes_the_method_known(tmp_path, bases, known, expected):
    trained(bases["llama"]).save_pretrained(tmp_path)
    command = [sys.executable, "-c", NOT_REGISTERED, str(bases["llama"]), str(tmp_path), known]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert result.stdout.strip().splitlines()[-1] == expected
