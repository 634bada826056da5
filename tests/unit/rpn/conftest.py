"""A batch for the models of noise_cases."""

import pytest
import torch


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(8).expand(3, -1) < torch.tensor([8, 5, 2])[:, None]
