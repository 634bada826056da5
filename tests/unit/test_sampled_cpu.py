"""The operator in C++: what it is built with, how its work is cut, and what happens where it cannot be built."""

import logging
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from sparse_zero import sampled_cpu, sampled_gradient
from sparse_zero.pattern import Pattern
from sparse_zero.sampled_cpu import MOST_GROUPS, SIDE, TOKENS, Sizes

MIB = 2**20
R, C, N = 48, 40, 700


@pytest.fixture
def pattern() -> Pattern:
    torch.manual_seed(0)
    return Pattern.of_cells(torch.randperm(R * C)[:200].sort().values, R, C)


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, R), torch.randn(N, C)


@pytest.fixture
def unbuilt():
    """Nothing is remembered, before and after."""
    sampled_cpu.operator.cache_clear()
    yield
    sampled_cpu.operator.cache_clear()


@pytest.mark.parametrize("sizes", [(16, 1), (16, 8), (64, 3), (64, 8), (1024, 1)])
def test_the_threads_do_not_change_a_bit(pattern, operands, sizes):
    product = sampled_cpu.operator()
    assert product is not None
    first, *others = [product(*operands, *pattern, *sizes, threads, torch.float32) for threads in (1, 2, 3, 16, 200)]
    expected = (operands[0].double().t() @ operands[1].double()).flatten()[pattern.flat_positions(C, slice(0, 200))]
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows, columns, pattern: (rows[1:], columns, *pattern), "do not fit"),
        (lambda rows, columns, pattern: (rows[:, 1:], columns, *pattern), "do not fit"),
        (lambda rows, columns, pattern: (rows, columns, pattern[0], pattern[1], 2), "do not fit"),
        (lambda rows, columns, pattern: (rows[:0], columns[:0], *pattern), "nothing to sum"),
        (lambda rows, columns, pattern: (rows, columns, pattern[0].long(), pattern[1], 1), "Int"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, operands, change, words):
    with pytest.raises(RuntimeError, match=words):
        sampled_cpu.operator()(*change(*operands, pattern), 64, 1, 1, torch.float32)


def test_tokens_are_whole_blocks(pattern, operands):
    with pytest.raises(RuntimeError, match="nothing to sum"):
        sampled_cpu.operator()(*operands, *pattern, SIDE + 1, 1, 1, torch.float32)


def test_the_constants_are_those_of_the_source():
    source = sampled_cpu.SOURCE.read_text()
    assert f"SIDE = {sampled_cpu.SIDE};" in source
    assert f"ROWS_AT_A_TIME = {sampled_cpu.ROWS_AT_A_TIME};" in source


def test_sizes(pattern):
    def sizes(N: int, bound: int, threads: int = 4, C: int = C) -> Sizes | None:
        return Sizes.of(N, C, pattern, torch.float32, bound, threads)

    assert sizes(10_000, 64 * MIB) == (TOKENS, MOST_GROUPS, 4)
    assert sizes(100, 64 * MIB) == (TOKENS, 2, 4)
    assert sizes(1, 64 * MIB) == (TOKENS, 1, 4)
    assert sizes(10_000, 64 * MIB, threads=1) == (TOKENS, MOST_GROUPS, 1)
    # Wide weights and many positions leave less room: for threads, for groups, for tokens, for nothing
    assert sizes(10_000, MIB, threads=64, C=1000) == (TOKENS, MOST_GROUPS, 1)
    assert sizes(10_000, 2 * 4 * 600, C=1) is None
    assert sizes(10_000, 2 * 4 * 257 * SIDE, C=1) == (SIDE, MOST_GROUPS, 1)
    many = Pattern(torch.zeros(1), torch.zeros(MIB // 4))
    assert Sizes.of(10_000, C, many, torch.float32, 4 * MIB, 1).groups == 2
    assert Sizes.of(10_000, C, many, torch.float64, 4 * MIB, 1).groups == 1


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT", "SVE256"])
def test_is_built_for_the_cpu_that_torch_sees(monkeypatch, unbuilt, capability):
    seen = {}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources, **options: seen.update(options, name=name))
    assert sampled_cpu.operator() is not None
    assert capability.lower() in seen["name"]
    assert ("-mavx512f" in seen["extra_cflags"]) == (capability == "AVX512")
    assert ("-mavx2" in seen["extra_cflags"]) == (capability == "AVX2")
    assert not any("native" in flag for flag in seen["extra_cflags"])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)\nand more"),
        subprocess.CalledProcessError(1, ["g++"]),
        FileNotFoundError(2, "No such file or directory", "g++"),
    ],
)
def test_without_a_compiler_the_gradient_is_read_from_dense_products(
    monkeypatch, unbuilt, caplog, pattern, operands, error
):
    expected = sampled_gradient.sampled_product(*operands, pattern)

    def fail(*_, **__):
        raise error

    sampled_cpu.operator.cache_clear()
    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setattr(sampled_gradient, "cheaper_way", lambda *_: "sampled")
    with caplog.at_level(logging.WARNING):
        found = [sampled_gradient.sampled_product(*operands, pattern) for _ in range(2)]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-4)
    (record,) = caplog.records
    assert "C++ compiler and ninja" in record.message
    assert "\n" not in record.message


def test_finds_ninja_where_no_environment_is_activated(monkeypatch, unbuilt):
    seen = []
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: seen.append(os.environ["PATH"]))
    sampled_cpu.operator()
    assert seen == [f"/usr/bin:{sysconfig.get_path('scripts')}"]
    assert os.environ["PATH"] == "/usr/bin"


def test_the_source_is_in_the_package():
    assert sampled_cpu.SOURCE.is_file()
    configuration = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "sparse_zero = csrc/*.cpp" in configuration
