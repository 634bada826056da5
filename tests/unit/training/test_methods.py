"""`training.method`: LoRA, DoRA, the whole model and the head, compared with stock transformers and PEFT."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, set_seed

from sparse_zero import UserError
from sparse_zero.checkpoint.export import export
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training.build import build, evaluation_settings, training_arguments
from sparse_zero.training.evaluate import evaluate
from sparse_zero.training.low_rank import rank_of_budget

TARGETS = ["q_proj", "v_proj"]
LORA = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}


def reference(file: Path, prepare) -> dict[str, torch.Tensor]:
    """The trained values by name after the same run of transformers' own Trainer."""
    recipe = load_recipe(file)
    arguments = training_arguments(recipe)
    arguments.save_strategy = "no"
    set_seed(arguments.seed)
    built = build(recipe, arguments)
    set_seed(arguments.seed)
    model = prepare(built.model)
    trainer = Trainer(
        model, arguments, train_dataset=built.prepared.train, **evaluation_settings(built.prepared, built.tokenizer)
    )
    trainer.train()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def with_lora(**more):
    def prepare(model):
        return peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM", **more))

    return prepare


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_trains_as_with_stock_peft_and_its_adapter_opens_there(recipe, train, tmp_path, method) -> None:
    file = recipe("run", training={"method": method, "lora": LORA, "save_strategy": "no"})
    results = train(file, merge=True)
    expected = reference(file, with_lora(use_dora=method == "dora"))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    # PEFT saves DoRA's magnitudes under the name of their module
    names = {n: n.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector") for n in expected}
    assert set(names.values()) == saved.keys()
    for name, values in expected.items():
        assert torch.equal(saved[names[name]], values), name
    assert results["trainable_parameters"] == sum(values.numel() for values in expected.values())
    assert (results["method"], results["rank"]) == (method, 3)
    assert results["train_tokens"] > 0
    assert results["checkpoint_bytes"] == 12 * results["trainable_parameters"]
    # What a user of PEFT does
    base = str(load_recipe(file).model.source)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    opened = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter").eval()
    assert opened.peft_config["default"].base_model_name_or_path == base
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype="float32").eval()
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, merged(ids).logits, atol=1e-5)
    again = evaluate(load_recipe(file), tmp_path / "run" / "adapter")
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-6)


def head_only(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    return model


@pytest.mark.parametrize(("method", "prepare"), [("full", lambda model: model), ("head", head_only)])
def test_a_plain_model_trains_as_with_stock_transformers(recipe, train, tmp_path, method, prepare) -> None:
    file = recipe("run", training={"method": method, "save_strategy": "no", "learning_rate": 1e-3})
    results = train(file)
    expected = reference(file, prepare)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="float32")
    values = dict(saved.named_parameters())
    for name, value in expected.items():
        assert torch.equal(values[name], value), name
    assert results["trainable_parameters"] == sum(value.numel() for value in expected.values())
    assert results["model_bytes"] > 4 * results["total_parameters"]
    again = evaluate(load_recipe(file), tmp_path / "run" / "model")
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-6)


@pytest.fixture
def classifier(recipe_base: Path, tmp_path: Path):
    """Writes a recipe of a classifier of sentences with these settings of `training`; returns its file."""

    def classifier(name: str, /, sparse: dict | None = None, data: dict | None = None, **training) -> Path:
        base = recipe_base / "classifier"
        if not base.exists():
            tiny_files.save_classifier(base)
        known = {"max_steps": 2, "learning_rate": 0.01, "eval_on_start": False} | training
        return recipes.write_recipe(
            tmp_path / f"{name}.yaml",
            base,
            "sequence-classification",
            recipe_base,
            training=known,
            sparse=sparse or {},
            data=data or {},
        )

    return classifier
