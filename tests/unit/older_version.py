"""Files written by version 0.1, and the script that wrote them. See tests/fixtures/v0.1/README.md."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

DIRECTORY = Path(__file__).parents[1] / "fixtures" / "v0.1"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fixtures_v0_1", DIRECTORY / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _script()
EXPECTED = json.loads((DIRECTORY / "expected.json").read_text())


def save_bases(directory: Path) -> None:
    """Write the base models to base/FAMILY, where the fixtures name them relative to the working directory."""
    for family in ("llama", "bert"):
        make.base_model(family).save_pretrained(directory / "base" / family)
