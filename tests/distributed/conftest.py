"""The process that forks the ranks, the bases that they train and the data: once per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import recipes
import tiny
from ranks import ForkServer


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("fork-server") / "errors.log")
    yield server
    server.close()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama and a random BERT with a tokenizer each, by task."""
    root = tmp_path_factory.mktemp("bases")
    tiny.save_llama(root / "llama")
    tiny.save_bert(root / "bert")
    return {"causal-lm": root / "llama", "sequence-classification": root / "bert"}


@pytest.fixture(scope="session")
def trainable(bases: dict[str, Path]) -> dict[str, int]:
    """Trainable scalars of the sparse models, by task."""
    return {
        task: tiny.trainable_count(tiny.AUTO_CLASS[task].from_pretrained(base), task) for task, base in bases.items()
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of train.jsonl and test.jsonl, see recipes.write_data."""
    directory = tmp_path_factory.mktemp("data")
    recipes.write_data(directory)
    return directory
