from pathlib import Path

import pytest
from peft_cases import save_bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Base models by family."""
    return save_bases(tmp_path_factory.mktemp("bases"))
