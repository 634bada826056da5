"""Damaged adapters: every command succeeds or raises one UserError, in 5 seconds and 1 GiB, and a model that refused
one is the same bit for bit. `make fuzz` draws thousands of them."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from older_version import make
from outcomes import bits, outcome
from seeds import BASE, FOREIGN, NATIVE, REFUSED, damaged, write_seeds
from torch import nn

from launcher.cli import main
from sparse_zero.adapters.combine import combine_adapters
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.adapters.switching import set_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify, unload
from sparse_zero.selection.config import SparseConfig

ADAPTER = Path("damaged")


@pytest.fixture(scope="module", autouse=True)
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The working directory with all seeds. What is imported at first use is imported without limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        write_seeds(Path.cwd())
        for name in [*NATIVE, *FOREIGN]:
            describe(name, BASE if name == "fine-tuned" else None)
        yield


def damage(names: list[str]) -> st.SearchStrategy[tuple[str, list[str]]]:
    return damaged(names, ADAPTER)


def fresh_path() -> Path:
    """A path where nothing is. What a test before this one wrote is deleted."""
    shutil.rmtree("out", ignore_errors=True)
    return Path("out")


@given(data=st.data())
def test_inspect(data):
    name, files = data.draw(damage([*NATIVE, *FOREIGN, *REFUSED]))
    note(f"{name}: {files}")
    base = BASE if name == "fine-tuned" else None
    error = outcome(lambda: json.dumps(describe(ADAPTER, base)))
    options = ["--base", BASE] if base else []
    assert (main(["inspect", str(ADAPTER), *options]) == 2) == (error is not None)


@pytest.fixture(scope="module")
def models(seeds) -> dict[str, nn.Module]:
    """The base model of each adapter, in evaluation mode."""
    return {name: make.opened(family, name).eval() for name, (family, _) in make.ADAPTERS.items()}


@given(data=st.data())
def test_load_on_a_base_model(data, models):
    name, files = data.draw(damage(NATIVE))
    note(f"{name}: {files}")
    model = models[name]
    before = bits(model)
    if outcome(lambda: load_adapter(model, ADAPTER)) is None:
        unload(model)
    assert bits(model) == before


@pytest.fixture(scope="module")
def sparse_models(seeds) -> dict[str, nn.Module]:
    """The base model of each adapter with the adapter."""
    return {name: load_adapter(make.opened(family, name).eval(), name) for name, (family, _) in make.ADAPTERS.items()}


@given(data=st.data())
def test_load_on_a_sparse_model(data, sparse_models):
    name, files = data.draw(damage(NATIVE))
    second = data.draw(st.sampled_from([None, "second"]))
    note(f"{name}: {files} as {second}")
    model = copy.deepcopy(sparse_models[name])
    before, logits = bits(model), make.last_logits(model, make.ADAPTERS[name][0], name)
    if outcome(lambda: load_adapter(model, ADAPTER, second)) is not None:
        assert bits(model) == before
    elif second is not None:
        outcome(lambda: set_adapter(model, second))
        set_adapter(model, "default")
        assert make.last_logits(model, make.ADAPTERS[name][0], name) == logits


@given(data=st.data())
def test_merge(data):
    name, files = data.draw(damage(NATIVE))
    note(f"{name}: {files}")
    out = fresh_path()
    error = outcome(lambda: write_merged(ADAPTER, out))
    assert error is None or not out.exists()


@given(data=st.data())
def test_convert(data):
    name, files = data.draw(damage([*NATIVE, *FOREIGN, *REFUSED]))
    to = data.draw(st.sampled_from(["sparse-zero", "sparta", "shira", "supertuning"]))
    note(f"{name}: {files} to {to}")
    out = fresh_path()
    error = outcome(lambda: convert(ADAPTER, out, to, BASE if name == "fine-tuned" else None))
    assert error is None or not out.exists()
    assert not [*Path().glob("*.unfinished-*")]


@given(data=st.data())
def test_combine(data):
    name, files = data.draw(damage(NATIVE))
    kind = data.draw(st.sampled_from(["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]))
    sources = data.draw(st.permutations([name, ADAPTER]))
    note(f"{name}: {files} {kind}")
    out = fresh_path()
    error = outcome(lambda: combine_adapters(sources, out, combination_type=kind, density=0.5))
    assert error is None or not out.exists()


def test_the_seeds_are_valid(models):
    """Without damage everything succeeds: the tests above do not only see refusals."""
    for name in NATIVE:
        unload(load_adapter(copy.deepcopy(models[name]), name))
        assert main(["inspect", name]) == 0
    for name in FOREIGN:
        convert(name, fresh_path(), "sparse-zero", BASE if name == "fine-tuned" else None)
    for name in REFUSED:
        with pytest.raises(UserError, match="LORA"):
            convert(name, fresh_path())
    model = sparsify(make.base_model("llama"), SparseConfig(density=0.03))
    assert torch.isfinite(model(input_ids=make.tokens(1)).logits).all()
