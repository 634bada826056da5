"""A base model and preference data, once per session."""

import json
from pathlib import Path

import pytest
import trl_cases


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    trl_cases.save_base(directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with NAME.jsonl for each objective, and rewards.py."""
    directory = tmp_path_factory.mktemp("data")
    for objective in trl_cases.OBJECTIVES:
        lines = [json.dumps(row) for row in trl_cases.rows(objective)]
        (directory / f"{objective}.jsonl").write_text("\n".join(lines))
    (directory / "rewards.py").write_text(
        "def red(completions, **_):\n"
        "    return [sum(word.startswith('red') for word in text.split()) / 8 for text in completions]\n\n\n"
        "def wanted(completions, wanted, **_):\n"
        "    return [float(word in text) for text, word in zip(completions, wanted, strict=True)]\n"
    )
    return directory
