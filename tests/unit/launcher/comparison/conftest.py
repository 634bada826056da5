"""A recipe to compare methods on."""

from pathlib import Path

import pytest
import recipes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    recipes.write_data(tmp_path)
    return recipes.write_recipe(tmp_path / "r.yaml", tmp_path / "base", "sequence-classification", tmp_path)
