"""A recipe in an empty working directory."""

from pathlib import Path

import pytest


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\n")
    return path.name
