"""Tokens that a recipe adds, from the tokenizer to the merged model."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_zero import SparseConfig, UserError, load_adapter, save_adapter, sparsify
from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.merging import write_merged
from sparse_zero.data.models import add_tokens, load_tokenizer, resize_embeddings
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.run import config_with_tokens

NEW = ["<question>", "<answer>"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A model with as many embeddings as its tokenizer has tokens."""
    shutil.copytree(tokenizer_dir, tmp_path / "base")
    size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    tiny("llama", vocab_size=size, tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_from_a_recipe_to_a_merged_model(base: Path, tmp_path: Path) -> None:
    data = {"path": "unused.csv", "columns": {"text": "text"}}
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base), "task": "causal-lm", "new_tokens": NEW},
            "data": data,
            "sparse": {"density": 0.01, "trainable_token_indices": [7]},
        }
    )
    tokenizer, model = load_tokenizer(str(base)), AutoModelForCausalLM.from_pretrained(base)
    before = len(tokenizer)
    add_tokens(tokenizer, recipe.model.new_tokens)
    resize_embeddings(model, tokenizer)
    config = config_with_tokens(recipe.sparse, recipe.model.new_tokens, tokenizer)
    assert config.trainable_token_indices == [7, before, before + 1]
    sparsify(model, config)
    model.sparsity.base_model, model.sparsity.new_tokens = str(base), NEW
    ids = tokenizer("<question> good <answer> bad", return_tensors="pt").input_ids
    assert (ids >= before).sum() == 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    save_adapter(model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter").new_tokens == NEW
    assert "new tokens: `<question>`, `<answer>`" in (tmp_path / "adapter" / "README.md").read_text()
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    own = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert torch.equal(own("<question> good <answer> bad", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_a_token_that_is_there_already(base: Path) -> None:
    with pytest.raises(UserError, match=r"model\.new_tokens: '<bos>' is already in the tokenizer's vocabulary"):
        add_tokens(load_tokenizer(str(base)), ["<new>", "<bos>"])


def test_spare_rows_are_used_before_the_embedding_grows(base: Path) -> None:
    tokenizer, model = load_tokenizer(str(base)), AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer) + 8)
    add_tokens(tokenizer, NEW)
    resize_embeddings(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 6


def test_the_adapter_asks_for_room(base: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(str(base)), AutoModelForCausalLM.from_pretrained(base)
    plain = copy.deepcopy(model)
    add_tokens(tokenizer, NEW)
    resize_embeddings(model, tokenizer)
    rows = tokenizer.convert_tokens_to_ids(NEW)
    save_adapter(sparsify(model, SparseConfig(density=0.01, trainable_token_indices=rows)), tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"resize_token_embeddings\({len(tokenizer)}\) for its new tokens"):
        load_adapter(plain, tmp_path / "adapter")
