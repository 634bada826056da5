"""The size of DeepSpeed's gradient buckets, if the configuration does not set it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sparse_zero import SparseConfig, sparsify
from sparse_zero.zero.parameters import MAX_BUCKET_SCALARS, fit_buckets


@pytest.fixture
def model() -> nn.Module:
    return sparsify(nn.Sequential(nn.Linear(32, 16)), SparseConfig(targets=["0"], density=0.1))


@pytest.mark.parametrize("given", [{}, {"reduce_bucket_size": "auto"}])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_default_is_the_number_of_trained_scalars(model: nn.Module, stage: int, given: dict) -> None:
    config = {"zero_optimization": {"stage": stage, **given}}
    fit_buckets(config, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < 100
    assert config == {"zero_optimization": {"stage": stage, "reduce_bucket_size": trained}}


@pytest.mark.parametrize(
    "config", [{}, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, {"zero_optimization": True}]
)
def test_a_configured_size_is_kept(model: nn.Module, config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    fit_buckets(config, model)
    assert config == before


def test_a_large_model_has_several_buckets() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    with torch.device("meta"):
        fit_buckets(config, nn.Linear(2**13, 2**13))
    assert config["zero_optimization"]["reduce_bucket_size"] == MAX_BUCKET_SCALARS
