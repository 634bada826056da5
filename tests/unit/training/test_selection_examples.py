"""Recipes that select by the gradients of training examples: which examples, and what a resumed run does."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_zero.adapters.files import read_adapter
from sparse_zero.recipe.recipe import Recipe, load_recipe
from sparse_zero.training import selection_examples
from sparse_zero.training.build import build, training_arguments

SPARSE = {"density": 0.05, "targets": ["v_proj", "down_proj"], "selection": "gradient", "selection_examples": 5}


@pytest.fixture(scope="module")
def base(recipe_base: Path) -> Path:
    return recipe_base / "base"


def test_the_examples_select_and_a_resumed_run_takes_the_positions_of_its_checkpoint(
    recipe, train, base, monkeypatch, tmp_path
):
    file = recipe("whole", sparse=SPARSE)
    train(file)
    parsed = load_recipe(file)
    examples = build(parsed, training_arguments(parsed)).prepared.train
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:5].tolist()
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for index in order:
        row = {name: torch.tensor([examples[index][name]]) for name in ("input_ids", "labels")}
        model(**row).loss.backward()
    adapter = tmp_path / "whole" / "adapter"
    stored = load_file(adapter / "adapter_positions.safetensors")
    assert len(stored) == 2 * model.config.num_hidden_layers
    for name, flat in stored.items():
        gradient = model.get_parameter(name).grad.abs().flatten()
        assert flat.tolist() == gradient.topk(len(flat)).indices.sort().values.tolist()

    def unexpected(*_, **__):
        raise AssertionError("a resumed run computes no gradients to select")

    monkeypatch.setattr(selection_examples, "by_gradient", unexpected)
    resumed = recipe("resumed", sparse=SPARSE)
    train(resumed, resume=str(tmp_path / "whole" / "checkpoint-2"))
    one, other = read_adapter(adapter), read_adapter(tmp_path / "resumed" / "adapter")
    assert one.config.tensors == other.config.tensors
    torch.testing.assert_close(one.deltas, other.deltas, rtol=0, atol=0)


def test_an_objective_of_trl_has_no_examples_to_select_by(recipe):
    raw = load_recipe(recipe("plain", sparse=SPARSE)).model_dump()
    raw["training"]["objective"] = "sft"
    with pytest.raises(ValidationError, match=r"sparse\.selection: gradient computes the gradients of a recipe"):
        Recipe.model_validate(raw)
