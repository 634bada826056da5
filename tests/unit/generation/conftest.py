"""A tiny model with a chat template, and an adapter of it."""

import shutil

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM

from sparse_zero.adapters.save_and_load import save_adapter
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig


@pytest.fixture(scope="package")
def base(tmp_path_factory, tokenizer_dir):
    """A model whose answers differ with the prompt: its weights are large. Its own settings are to sample."""
    directory = tmp_path_factory.mktemp("base")
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    model = tiny("llama", vocab_size=2000, initializer_range=0.4, max_position_embeddings=96)
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="package")
def adapter(base, tmp_path_factory):
    model = sparsify(AutoModelForCausalLM.from_pretrained(base), SparseConfig(density=0.01))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 2)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory)
    return directory
