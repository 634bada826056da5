"""Base models and an adapter for several files."""

import shutil
from pathlib import Path

import pytest
from adapter_cases import FAMILIES, trained
from families import tiny
from stranger_cases import trained_adapter

from sparse_zero.adapters.save_and_load import save_adapter


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer_dir) -> dict[str, Path]:
    """A directory with a tiny random model and a tokenizer for each family; BERT's without a head."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        shutil.copytree(tokenizer_dir, found[family], dirs_exist_ok=True)
        model = tiny(family, "sequence-classification" if family == "bert" else "causal-lm")
        (model.base_model if family == "bert" else model).save_pretrained(found[family])
    return found


@pytest.fixture
def adapter(bases, tmp_path) -> Path:
    """An adapter of the BERT classifier."""
    save_adapter(trained(bases["bert"]), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="session")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    """An adapter of Llama by each rule."""
    out = tmp_path_factory.mktemp("adapters")
    kinds = ("stratified", "bernoulli", "magnitude")
    return {kind: trained_adapter(bases["llama"], out / kind, selection=kind) for kind in kinds}


@pytest.fixture
def llama(adapters, tmp_path) -> Path:
    return Path(shutil.copytree(adapters["stratified"], tmp_path / "adapter"))
