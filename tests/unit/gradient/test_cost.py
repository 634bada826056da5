"""The model that chooses between the kernels and the dense product, and the machine code that it speaks of."""

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
from sparse_zero.gradient.cost import Pieces, Speeds, is_cheaper, kernel_is_cheaper, strips_per_tile

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


def test_what_moves_the_balance():
    # Tensor cores against the cache: an H100 has three times the FLOPs of an A100, and not three times the rest
    assert cheaper(0.01, A100)
    assert not cheaper(0.01, H100)
    assert cheaper(0.01, H100, granularity=16)
    assert cheaper(0.01, H100, dtype=torch.float32)
    # The dense product of few tokens is written whole all the same
    assert cheaper(0.01, H100, N=64)


@pytest.mark.parametrize(
    "allow", ["torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"]
)
def test_dense_float32_products_are_faster_where_tf32_is_allowed(allow):
    # In a process of its own: torch refuses to read one name after the other was written
    script = f"""
import torch
from test_cost import A100, cheaper
before = cheaper(0.05, A100, dtype=torch.float32)
{allow}
print(before, cheaper(0.05, A100, dtype=torch.float32))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "False"], ended.stderr


def test_longer_strips_than_a_program_has_registers_for_are_read_from_the_dense_product():
    assert [cheaper(0.01, granularity=granularity) for granularity in (32, 64, 128, 256)] == [True, True, False, False]


def test_devices_that_are_not_known_compute_densely():
    assert not cheaper(0.001, SimpleNamespace(**{**vars(A100), "major": 7, "minor": 5}))
    without = {name: value for name, value in vars(A100).items() if name != "memory_bus_width"}
    assert not cheaper(0.001, SimpleNamespace(**without))
    # A newer one counts as the newest that is known before it
    newer = SimpleNamespace(**{**vars(H100), "minor": 9})
    assert dataclasses.astuple(Speeds.of(newer)) == dataclasses.astuple(Speeds.of(H100))


def test_no_kernel_is_chosen_on_the_cpu():
    assert not kernel_is_cheaper(torch.empty(4096, 64), torch.empty(4096, 64), 1, 1, BOUND)


def test_a_device_is_asked_once(monkeypatch):
    """The driver takes a millisecond to tell, and a step has hundreds of gradients."""
    device, asked = torch.device("cuda", 7), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or H100)
    cost._properties.cache_clear()
    try:
        for _ in range(2):
            assert Speeds.of(cost._properties(device)) == Speeds.of(H100)
    finally:
        cost._properties.cache_clear()
    assert asked == [device]


def test_pieces_hold_no_more_tokens_than_there_are_or_fit():
    assert Pieces.of(1000, 64, torch.bfloat16, BOUND, cached=32).width == 1024
    assert Pieces.of(10**6, 2**14, torch.bfloat16, BOUND, cached=2**13).width == 1024
    assert Pieces.of(10**6, 2**14, torch.bfloat16, BOUND).width == 2048
    # Two halves, and not 1,792 with a rest of 256
    assert Pieces.of(2048, 18432, torch.bfloat16, BOUND, cached=4096).width == 1024
    assert Pieces.of(2049, 18432, torch.bfloat16, BOUND).width == 1280
    assert Pieces.of(100, 64, torch.bfloat16, BOUND).width == 128
    assert Pieces.of(10**6, 2**14, torch.bfloat16, 2**20, cached=2**13).width == 32
    assert Pieces.of(10**6, 2**14, torch.bfloat16, 1) == Pieces(16, 16)
    assert Pieces.of(0, 64, torch.float32, BOUND) == Pieces(32, 32)


def test_tiles_of_strips_keep_their_sums_in_registers():
    assert [strips_per_tile(512 * each, 512, 16) for each in (1, 20, 41, 82, 123)] == [16, 32, 16, 32, 64]
    assert [strips_per_tile(blocks * 123, blocks, 16) for blocks in (64, 96, 192, 512)] == [16, 32, 64, 64]
    assert strips_per_tile(512 * 400, 512, 64) == 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    """What each kernel takes; compiled in a process that no test has told to interpret them."""
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
    assert {name.split()[1] for name in compiled} == {"tokens_last", "sampled", "strips", "read", "write"}
    for name, takes in compiled.items():
        assert takes["stack"] <= 8, (name, takes)
        assert takes["registers"] <= 128, (name, takes)
        # Two programs fit into the 99 KiB of the smallest devices, or the 227 of the others
        assert takes["shared"] <= (48 if "sm_80" in name else 113) * 1024, (name, takes)


def test_strips_of_half_precision_use_tensor_cores_and_all_read_whole_lines(compiled):
    for name, takes in compiled.items():
        assert (takes["tensor cores"] > 0) == ("strips" in name and "fp32" not in name), (name, takes)
        assert (takes["loads of 16 bytes"] > 0) == (name.split()[1] not in ("read", "write")), (name, takes)
