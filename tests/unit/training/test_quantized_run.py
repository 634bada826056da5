"""Whole runs on a quantised base model: trained, evaluated, merged, answered, and resumed with the same kind only."""

import json
from pathlib import Path

import pytest
import torch
from families import tiny
from quantized_cases import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_zero.adapters.files import read_config
from sparse_zero.errors import UserError
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.evaluate import evaluate
from sparse_zero.training.run import train

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

TEXTS = ["a good film", "bad", "it is what it is", "one of the worst"] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir) -> Path:
    path = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    save_base(path, hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def recipe(quantization: object, task: str = "causal-lm", name: Path = base, **training: object) -> Recipe:
        columns = {"text": "text", **({"label": "label"} if task != "causal-lm" else {})}
        rows = [{"text": text, "label": index % 2} for index, text in enumerate(TEXTS)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"output_dir": "run", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        settings |= {"learning_rate": 0.03, "max_steps": 3, "run_name": "r"} | training
        return Recipe(
            model={"name": str(name), "task": task, "quantization": quantization},
            data={"path": "data.jsonl", "columns": columns, "eval_split": "train", "max_length": 16},
            training=settings,
            sparse={"density": 0.02, "targets": "all-linear", "columns": "whole"},
        )

    return recipe


def test_a_run_from_the_recipe_to_the_merged_model(recipe, tmp_path):
    double = {"kind": "nf4", "bnb_4bit_use_double_quant": True}
    results = train(recipe(double), "r.yaml", merge=True)
    assert results["loss"] < results["loss_before"] - 0.05
    config = read_config(tmp_path / "run" / "adapter")
    assert (config.quantization.kind, [*config.quantized]) == ("nf4", ["nf4-double"])
    figures = evaluate(recipe(double), tmp_path / "run" / "adapter")
    assert figures == pytest.approx({name: results[name] for name in figures}, abs=1e-5)
    merged = evaluate(recipe(None, name=tmp_path / "run" / "merged"), _empty_adapter(tmp_path))
    assert merged["loss"] == pytest.approx(results["loss"], abs=0.03), "within the rounding of bfloat16"
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype="auto")
    assert alone.dtype == torch.bfloat16
    assert not [*quantized_layers(alone)]


def _empty_adapter(folder: Path) -> Path:
    """An adapter of the merged model that changes nothing."""
    from sparse_zero.adapters.save_and_load import save_adapter
    from sparse_zero.model.sparsify import sparsify
    from sparse_zero.selection.config import SparseConfig

    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "merged", dtype=torch.float32)
    save_adapter(sparsify(model, SparseConfig()), folder / "empty")
    return folder / "empty"


def test_an_adapter_on_another_kind_of_base_warns(recipe, tmp_path, caplog):
    train(recipe("nf4"), "r.yaml")
    caplog.clear()
    evaluate(recipe(None), tmp_path / "run" / "adapter")
    assert "was trained on a base model in nf4, and is loaded on one that is not quantised" in caplog.text


def test_a_classifier_keeps_its_head(recipe, tmp_path, tokenizer):
    bert = tiny("bert", "sequence-classification", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64)
    bert.base_model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    run = recipe("int8_weight_only", "sequence-classification", tmp_path / "bert", learning_rate=3e-3)
    results = train(run, "r.yaml", merge=True)
    config = read_config(tmp_path / "run" / "adapter")
    assert "classifier.weight" in config.modules_to_save
    assert "classifier" in config.quantization.llm_int8_skip_modules
    assert results["paths"]["merged"] == "run/merged"


def test_a_run_is_not_resumed_on_another_kind(recipe, tmp_path):
    train(recipe("nf4", save_strategy="steps", save_steps=2), "r.yaml")
    with pytest.raises(UserError, match="was saved with a base model whose weights differ"):
        train(recipe("fp4", save_strategy="steps", save_steps=2), "r.yaml", resume="auto")
