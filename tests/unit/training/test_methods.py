"""`training.method`: LoRA, DoRA, the whole model and the head, compared with stock transformers and PEFT."""

import json
import logging
import re
import shutil
from pathlib import Path

import peft
import pytest
import recipes
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, set_seed

from sparse_zero import UserError
from sparse_zero.checkpoint.export import export
from sparse_zero.data.models import meta_model
from sparse_zero.planning.planned_run import describe_run
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training.build import build, evaluation_settings, training_arguments
from sparse_zero.training.evaluate import evaluate
from sparse_zero.training.low_rank import rank_of_budget
from sparse_zero.training.plain_methods import apply_method
from sparse_zero.training.rate_search import find_rate
from sparse_zero.training.recipe_check import check_recipe, load_model_config

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
        if not (base := recipe_base / "classifier").exists():
            tiny.save_bert(base)
        known = {"max_steps": 2, "learning_rate": 0.01, "eval_on_start": False} | training
        file = tmp_path / f"{name}.yaml"
        sections = {"training": known, "sparse": sparse or {}, "data": data or {}}
        return recipes.write_recipe(file, base, "sequence-classification", recipe_base, **sections)

    return classifier


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_classifier_trains_its_head_too_and_its_result_is_a_classifier(classifier, train, tmp_path, method) -> None:
    file = classifier("run", method=method)
    results = train(file, merge=method == "lora")
    opened = tmp_path / "run" / ("merged" if method == "lora" else "model")
    model = AutoModelForSequenceClassification.from_pretrained(opened)
    assert sorted(model.config.id2label.values()) == ["even", "odd"]
    base = AutoModelForSequenceClassification.from_pretrained(load_recipe(file).model.source)
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed == ({"classifier"} if method == "head" else {"bert", "classifier"})
    if method == "head":
        assert results["trainable_parameters"] == sum(p.numel() for p in base.classifier.parameters())
    directory = tmp_path / "run" / ("adapter" if method == "lora" else "model")
    assert evaluate(load_recipe(file), directory)["loss"] == pytest.approx(results["loss"], rel=1e-6)


@pytest.mark.parametrize(("method", "noise"), [("dora", {"probability": 0.3}), ("full", None)])
def test_a_resumed_run_is_the_same_bit_for_bit(recipe, train, tmp_path, method, noise) -> None:
    """And the checkpoints are those of sparse runs, so that restarts, signals and other numbers of ranks work too."""
    lora = {"lora": {"r": 2, "lora_dropout": 0.2}} if method != "full" else {}
    given = {"training": {"method": method, "gradient_accumulation_steps": 2, **lora}, "rpn": noise}
    for name in ("whole", "parts"):
        recipe(name, **{key: value for key, value in given.items() if value is not None})
    whole = train(tmp_path / "whole.yaml")
    parts = tmp_path / "parts"
    train(tmp_path / "parts.yaml")
    for step in (3, 4):
        shutil.rmtree(parts / f"checkpoint-{step}")
    assert train(tmp_path / "parts.yaml", resume="auto")["loss"] == whole["loss"]
    file = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    saved = [load_file(tmp_path / name / file) for name in ("whole", "parts")]
    assert all(torch.equal(values, saved[1][name]) for name, values in saved[0].items())
    with pytest.raises(UserError, match=rf"checkpoint-4: is a checkpoint of training.method: {method}; only those of"):
        export(parts, tmp_path / "exported")
    # The newest checkpoint, and its parameters, are of another method
    (parts / "results.json").unlink()
    for other in {"full", "lora", "sparse"} - {method}:
        options = [f"training.method={other}", *(["training.lora=null"] if other != "lora" else [])]
        with pytest.raises(UserError, match=rf"checkpoint-4: is of training.method: {method}, not {other}: resume"):
            train(tmp_path / "parts.yaml", *options, resume="auto")


def test_a_budget_gives_the_rank_with_the_nearest_count(classifier, train, tmp_path) -> None:
    """The count of a sparse run by its own results, that of LoRA by its own: they differ by less than half a rank."""
    sparse = {"density": 0.2, "targets": "all-linear"}
    wanted = train(classifier("sparse", sparse))["trainable_parameters"]
    for method in ("lora", "dora"):
        results = train(classifier(method, sparse, method=method, budget="same"))
        assert results["sparse_parameters"] == wanted
        assert results["rank"] > 1
        config = json.loads((tmp_path / method / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (results["rank"], 2 * results["rank"])
        saved = load_file(tmp_path / method / "adapter" / "adapter_model.safetensors")
        step = sum(each.numel() for n, each in saved.items() if "lora_A" in n or "lora_B" in n) / results["rank"]
        assert abs(results["trainable_parameters"] - wanted) <= step / 2


def test_the_equal_rank_is_the_number_of_drawn_columns(classifier, train, tmp_path) -> None:
    sparse = {"density": 0.1, "targets": ["query", "value"], "columns": "whole"}
    train(classifier("sparse", sparse))
    drawn = json.loads((tmp_path / "sparse" / "adapter" / "adapter_config.json").read_text())["tensors"]
    columns = {name.removesuffix(".weight"): each["columns"]["count"] for name, each in drawn.items()}
    results = train(classifier("lora", sparse, method="lora", budget="equal-rank"))
    assert (results["rank"], results["least_rank"]) == (max(columns.values()), min(columns.values()))
    saved = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    for name, count in columns.items():
        assert saved[f"base_model.model.{name}.lora_A.weight"].shape[0] == count


@pytest.mark.parametrize(
    ("wanted", "layers", "magnitudes", "rank"),
    [
        (1000, [(1, 40, 60)], False, 10),
        (1049, [(1, 40, 60)], False, 10),
        (1051, [(1, 40, 60)], False, 11),
        (1040, [(1, 40, 60)], True, 10),
        (3, [(1, 40, 60)], False, 1),
        (2000, [(1, 40, 60), (2, 20, 30)], False, 10),
    ],
)
def test_rank_of_budget(wanted, layers, magnitudes, rank) -> None:
    assert rank_of_budget(wanted, layers, magnitudes) == rank


def test_chunked_loss_of_lora_is_the_plain_one(recipe, train) -> None:
    plain = train(recipe("plain", training={"method": "lora", "lora": LORA}))
    chunked = train(recipe("chunked", training={"method": "lora", "lora": LORA, "chunked_loss": True}))
    assert chunked["loss"] == pytest.approx(plain["loss"], abs=1e-5)


def test_the_head_of_a_tied_model_is_said(recipe, train, recipe_base, tmp_path, caplog) -> None:
    model = AutoModelForCausalLM.from_pretrained(recipe_base / "base", tie_word_embeddings=True)
    model.tie_weights()
    shutil.copytree(recipe_base / "base", tmp_path / "tied")
    model.save_pretrained(tmp_path / "tied")
    file = recipe("run", model={"name": str(tmp_path / "tied")}, training={"method": "head", "save_strategy": "no"})
    with caplog.at_level(logging.WARNING):
        results = train(file)
    assert "is tied to its input embedding, which is trained with it" in caplog.text
    assert results["head_is_tied"] is True
    assert results["trainable_parameters"] == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"method": "lore"}}, "training.method: unknown method 'lore'; did you mean 'lora'?"),
        ({"training": {"lora": {"r": 4}}}, "training.lora: only for training.method: lora and dora, not sparse"),
        ({"training": {"method": "full", "budget": "same"}}, "training.budget: only for training.method: lora and d"),
        (
            {"training": {"method": "lora", "budget": "more"}},
            "training.budget: must be same or equal-rank, n",
        ),
        ({"training": {"method": "lora", "budget": "same", "lora": {"r": 4}}}, "training.budget: same sets the rank"),
        ({"training": {"method": "lora", "lora": 4}}, "training.lora: must be a mapping of LoraConfig's settings"),
        ({"training": {"method": "lora", "lora": {"use_dora": True}}}, "training.lora.use_dora: follows from the rec"),
        ({"training": {"method": "lora", "objective": "sft"}}, "training.method: lora trains without an objective"),
        ({"training": {"method": "head"}, "model": {"new_tokens": ["<x>"]}}, "head trains no rows of model.new_tok"),
        ({"training": {"method": "lora", "lora": {"rank": 4}}}, "training.lora: LoraConfig has no 'rank'"),
        ({"training": {"method": "lora", "lora": {"r": -1}}}, "training.lora: `r` should be a positive integer"),
        ({"training": {"method": "lora", "lora": {"target_modules": ["nose"]}}}, "training.lora: Target modules"),
        ({"training": {"method": "lora"}, "sparse": {"targets": ["*norm"]}}, "have no linear layer, which LoRA needs"),
        (
            {"training": {"method": "lora", "budget": "same", "lora": {"target_modules": ["q_proj"]}}},
            "training.budget: counts the layers of sparse.targets; leave training.lora.target_modules out",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(recipe, sections, message) -> None:
    def check() -> None:
        loaded = load_recipe(recipe("run", **sections))
        check_recipe(loaded, training_arguments(loaded))

    with pytest.raises(UserError, match=re.escape(message)) as raised:
        check()
    assert "\n" not in str(raised.value)


def test_other_commands_say_that_they_are_for_sparse_runs(recipe, train) -> None:
    file = recipe("run", training={"method": "full", "save_strategy": "no"})
    loaded = load_recipe(file)
    with pytest.raises(UserError, match=r"plan: only for sparse runs, not for training.method: full"):
        describe_run(loaded)
    with pytest.raises(UserError, match=r"--find-rate: only for sparse runs, not for training.method: full"):
        find_rate(loaded, str(file))
    with pytest.raises(UserError, match=r"--merge: training.method: full writes a plain model, to OUTPUT_DIR/model"):
        train(file, merge=True)
    with pytest.raises(UserError, match=r"is not a model directory, as training.method: full writes it"):
        evaluate(loaded, file.parent)


@pytest.mark.parametrize("method", ["full", "head"])
def test_a_quantized_model_trains_adapters_only(recipe, method) -> None:
    loaded = load_recipe(recipe("run", training={"method": method}))
    model = meta_model(load_model_config(loaded), "causal-lm", torch.float32)
    model.is_quantized = True  # as from_pretrained marks it
    with pytest.raises(UserError, match=rf"training.method: {method}: .* is quantized, and the Trainer trains only"):
        apply_method(model, loaded)


def test_the_learning_rate_of_a_method_is_said(recipe, caplog) -> None:
    file = recipe("run")
    loaded = load_recipe(file, ["training.method=full"])
    del loaded.training["learning_rate"]
    with caplog.at_level(logging.WARNING):
        assert training_arguments(loaded).learning_rate == 3e-4
    assert "training.learning_rate is not set: 0.0003, the default for causal-lm and method: full" in caplog.text
