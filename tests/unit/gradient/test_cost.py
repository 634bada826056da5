"""The cost model that chooses between the kernels and the dense product, and the resources of the kernels."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_zero.gradient import cost
from sparse_zero.gradient.cost import Speeds, TokenChunks, is_cheaper, kernel_is_cheaper, strips_per_tile

BOUND = 64 * 2**20
A100 = SimpleNamespace(
    major=8,
    minor=0,
    multi_processor_count=108,
    clock_rate=1_410_000,
    memory_clock_rate=1_593_000,
    memory_bus_width=5120,
)
H100 = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    clock_rate=1_830_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)


def cheaper(density: float, device=A100, N=4096, R=4096, C=4096, dtype=torch.bfloat16, granularity=1) -> bool:
    n = round(density * R * C) // granularity * granularity
    return is_cheaper(N, R, C, n, dtype, device, BOUND, granularity)


def test_peaks_are_those_of_the_data_sheets():
    for device, half, single, memory in ((A100, 312e12, 19.5e12, 2039e9), (H100, 989e12, 61.8e12, 3352e9)):
        speeds = Speeds.of(device)
        assert speeds.half == pytest.approx(half, rel=0.01)
        assert speeds.single == pytest.approx(single, rel=0.01)
        assert speeds.memory / cost.MEMORY_SHARE == pytest.approx(memory, rel=0.01)


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_wins_above_some_density_and_not_below(device, granularity, dtype):
    densities = [10 ** (exponent / 4) for exponent in range(-16, 1)]
    answers = [cheaper(density, device, dtype=dtype, granularity=granularity) for density in densities]
    assert answers[0]
    assert not answers[-1] or granularity == 16
    assert answers == sorted(answers, reverse=True)


def test_the_choice_depends_on_device_strips_dtype_and_tokens():
    # An H100 has three times the FLOPs of an A100, but less than three times its cache bandwidth
    assert cheaper(0.01, A100)
    assert not cheaper(0.01, H100)
    assert cheaper(0.01, H100, granularity=16)
    assert cheaper(0.01, H100, dtype=torch.float32)
    # The dense product is written completely even for few tokens
    assert cheaper(0.01, H100, N=64)


@pytest.mark.parametrize(
    "allow", ["torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"]
)
def test_dense_float32_products_are_faster_where_tf32_is_allowed(allow):
    # In a separate process, because torch does not allow reading one name after setting the other
    script = f"""
import torch
from test_cost import A100, cheaper
before = cheaper(0.05, A100, dtype=torch.float32)
{allow}
print(before, cheaper(0.05, A100, dtype=torch.float32))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "False"], ended.stderr


def test_strips_that_are_too_long_for_the_registers_use_the_dense_product():
    assert [cheaper(0.01, granularity=granularity) for granularity in (32, 64, 128, 256)] == [True, True, False, False]


def test_unknown_devices_use_the_dense_product():
    assert not cheaper(0.001, SimpleNamespace(**{**vars(A100), "major": 7, "minor": 5}))
    without = {name: value for name, value in vars(A100).items() if name != "memory_bus_width"}
    assert not cheaper(0.001, SimpleNamespace(**without))
    # A newer device is treated like the newest known one before it
    newer = SimpleNamespace(**{**vars(H100), "minor": 9})
    assert dataclasses.astuple(Speeds.of(newer)) == dataclasses.astuple(Speeds.of(H100))


def test_no_kernel_is_chosen_on_a_cpu():
    assert not kernel_is_cheaper(torch.empty(4096, 64), torch.empty(4096, 64), 1, 1, BOUND)


def test_the_properties_of_a_device_are_read_once(monkeypatch):
    """The driver needs a millisecond, and a step has hundreds of gradients."""
    device, queries = torch.device("cuda", 7), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: queries.append(device) or H100)
    cost._properties.cache_clear()
    try:
        for _ in range(2):
            assert Speeds.of(cost._properties(device)) == Speeds.of(H100)
    finally:
        cost._properties.cache_clear()
    assert queries == [device]


def test_chunks_are_not_larger_than_the_batch_or_the_limit():
    assert TokenChunks.fit(1000, 64, torch.bfloat16, BOUND, cached=32).width == 1024
    assert TokenChunks.fit(10**6, 2**14, torch.bfloat16, BOUND, cached=2**13).width == 1024
    assert TokenChunks.fit(10**6, 2**14, torch.bfloat16, BOUND).width == 2048
    # Two halves, not 1,792 with a rest of 256
    assert TokenChunks.fit(2048, 18432, torch.bfloat16, BOUND, cached=4096).width == 1024
    assert TokenChunks.fit(2049, 18432, torch.bfloat16, BOUND).width == 1280
    assert TokenChunks.fit(100, 64, torch.bfloat16, BOUND).width == 128
    assert TokenChunks.fit(10**6, 2**14, torch.bfloat16, 2**20, cached=2**13).width == 32
    assert TokenChunks.fit(10**6, 2**14, torch.bfloat16, 1) == TokenChunks(16, 16)
    assert TokenChunks.fit(0, 64, torch.float32, BOUND) == TokenChunks(32, 32)


def test_the_sums_of_a_tile_of_strips_fit_into_registers():
    assert [strips_per_tile(512 * each, 512, 16) for each in (1, 20, 41, 82, 123)] == [16, 32, 16, 32, 64]
    assert [strips_per_tile(blocks * 123, blocks, 16) for blocks in (64, 96, 192, 512)] == [16, 32, 64, 64]
    assert strips_per_tile(512 * 400, 512, 64) == 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    """The resources of each kernel, compiled in a process in which Triton's interpreter is not enabled."""
    if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_kernels.py")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_kernels_compile_and_do_not_spill(compiled):
    assert {name.split()[0] for name in compiled} == {"sm_80", "sm_90"}
    assert {name.split()[1] for name in compiled} == {
        *("tokens_last", "sampled", "strips", "gather", "write", "write_all", "write_all_columns"),
        *("circles", "move"),
    }
    for name, resources in compiled.items():
        assert resources["stack"] <= 8, (name, resources)
        assert resources["registers"] <= 128, (name, resources)
        # Two programs fit into the 99 KiB of the smallest devices, or the 227 KiB of the others
        assert resources["shared"] <= (48 if "sm_80" in name else 113) * 1024, (name, resources)


WIDE = ("tokens_last", "sampled", "strips")
"""The kernels that read contiguous memory; the others are bound by scattered reads and writes."""


def test_half_precision_strips_use_tensor_cores_and_all_kernels_use_wide_loads(compiled):
    for name, resources in compiled.items():
        assert (resources["tensor cores"] > 0) == ("strips" in name and "fp32" not in name), (name, resources)
        assert (resources["loads of 16 bytes"] > 0) == (name.split()[1] in WIDE), (name, resources)
