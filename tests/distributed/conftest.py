"""The bases that the ranks train, saved once per session."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama and a random BERT with a tokenizer each, by task."""
    root = tmp_path_factory.mktemp("bases")
    tiny.save_llama(root / "llama")
    tiny.save_bert(root / "bert")
    return {"causal-lm": root / "llama", "sequence-classification": root / "bert"}
