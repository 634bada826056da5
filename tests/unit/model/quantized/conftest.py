from pathlib import Path

import pytest
import torch
from quantized_cases import SIZES, save_base

for package in ("bitsandbytes", "torchao"):
    pytest.importorskip(package)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a head of its own, float32."""
    return save_base(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.fixture(scope="session")
def half_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16."""
    return save_base(tmp_path_factory.mktemp("half"), dtype=torch.bfloat16, **SIZES)
