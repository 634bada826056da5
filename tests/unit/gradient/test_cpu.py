"""The C++ operator: its compilation, the division of its work, and what happens if it cannot be compiled."""

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from sparse_zero.gradient import cpu, sampled
from sparse_zero.gradient.cpu import CHUNK_TOKENS, MAX_GROUPS, TILE, Tiling
from sparse_zero.gradient.pattern import Pattern

MIB = 2**20
R, C, N = 48, 40, 700


@pytest.fixture
def pattern() -> Pattern:
    torch.manual_seed(0)
    return Pattern(torch.randperm(R * C)[:200].sort().values, R, C)


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, R), torch.randn(N, C)


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """An empty directory for extensions. What this process has already loaded stays loaded."""
    assert cpu.load_operator() is not None
    cpu.load_operator.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    yield tmp_path
    cpu.load_operator.cache_clear()


def reference(rows: torch.Tensor, columns: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    flat = torch.cat([*pattern.flat_chunks()])
    return (rows.double().t() @ columns.double()).flatten()[flat]


@pytest.mark.parametrize("threads", [1, 2, 3, 65])
@pytest.mark.parametrize(
    ("rows", "granularity"),
    [(600, 1), (600, 3), (602, 7), (600, 6), (576, 48), (600, 300), (257, 1), (3, 1)],
)
def test_more_rows_than_are_transposed_at_a_time(rows, granularity, threads):
    torch.manual_seed(0)
    indices = torch.randperm(rows // granularity * C)[: 9 * max(1, 60 // granularity)].sort().values
    pattern = Pattern(indices, rows, C, granularity)
    operands = torch.randn(150, rows), torch.randn(150, C)
    result = cpu.load_operator()(*operands, *pattern.by_blocks, 64, 3, threads, torch.float32)
    torch.testing.assert_close(result.double(), reference(*operands, pattern), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(16, 1), (16, 8), (64, 3), (64, 8), (1024, 1)])
def test_the_result_does_not_depend_on_the_number_of_threads(sizes):
    torch.manual_seed(0)
    pattern = Pattern(torch.randperm(120 * 60)[:4100].sort().values, 120, 60)
    operands = torch.randn(N, 120), torch.randn(N, 60)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 65):
            torch.set_num_threads(threads)
            found.append(cpu.load_operator()(*operands, *pattern.by_blocks, *sizes, threads, torch.float32))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0].double(), reference(*operands, pattern), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows, columns, pattern: (rows[1:], columns, *pattern), "do not fit"),
        (lambda rows, columns, pattern: (rows[:, 1:], columns, *pattern), "do not fit"),
        (lambda rows, columns, pattern: (rows, columns, pattern[0], pattern[1], 2), "do not fit"),
        (lambda rows, columns, pattern: (rows[:, :0], columns, pattern[0][:1], pattern[1], 0), "do not fit"),
        (lambda rows, columns, pattern: (rows[:0], columns[:0], *pattern), "nothing to sum"),
        (lambda rows, columns, pattern: (rows, columns, pattern[0], pattern[1][1:], 1), "does not fit strip_columns"),
        (lambda rows, columns, pattern: (rows.int(), columns, *pattern), "real numbers"),
        (lambda rows, columns, pattern: (rows, columns, pattern[0].long(), pattern[1], 1), "Int"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pattern, operands, change, words):
    with pytest.raises(RuntimeError, match=words):
        cpu.load_operator()(*change(*operands, pattern.by_blocks), 64, 1, 1, torch.float32)


def test_the_number_of_tokens_must_be_a_multiple_of_the_tile(pattern, operands):
    with pytest.raises(RuntimeError, match="nothing to sum"):
        cpu.load_operator()(*operands, *pattern.by_blocks, TILE + 1, 1, 1, torch.float32)


def test_the_constants_are_those_of_the_source():
    source = cpu.SOURCE.read_text()
    assert f"TILE = {cpu.TILE};" in source
    assert f"CHUNK_ROWS = {cpu.CHUNK_ROWS};" in source


def test_tiling(pattern):
    def tiling(N: int, bound: int, threads: int = 4, C: int = C) -> Tiling | None:
        return Tiling.fit(N, C, pattern.count, pattern.granularity, torch.float32, bound, threads)

    assert tiling(10_000, 64 * MIB) == (CHUNK_TOKENS, MAX_GROUPS, 4)
    assert tiling(100, 64 * MIB) == (CHUNK_TOKENS, 2, 4)
    assert tiling(1, 64 * MIB) == (CHUNK_TOKENS, 1, 4)
    assert tiling(10_000, 64 * MIB, threads=1) == (CHUNK_TOKENS, MAX_GROUPS, 1)
    # Wide weights and many positions leave memory for fewer threads, fewer groups, fewer tokens, or no tiling
    assert tiling(10_000, MIB, threads=64, C=1000) == (CHUNK_TOKENS, MAX_GROUPS, 1)
    assert tiling(10_000, 2 * 4 * 600, C=1) is None
    assert tiling(10_000, 2 * 4 * 257 * TILE, C=1) == (TILE, MAX_GROUPS, 1)
    many = Pattern(torch.zeros(MIB // 4), 1, C)
    assert Tiling.fit(10_000, C, many.count, many.granularity, torch.float32, 4 * MIB, 1).groups == 2
    assert Tiling.fit(10_000, C, many.count, many.granularity, torch.float64, 4 * MIB, 1).groups == 1


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT", "SVE256"])
def test_is_compiled_for_the_cpu_capability_that_torch_reports(monkeypatch, unbuilt, capability):
    seen = {}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources, **options: seen.update(options, name=name))
    assert cpu.load_operator() is not None
    assert seen["build_directory"] == str(unbuilt / seen["name"])
    assert ("-mavx512f" in seen["extra_cflags"]) == (capability == "AVX512")
    assert ("-mavx2" in seen["extra_cflags"]) == (capability == "AVX2")
    assert not any("native" in flag for flag in seen["extra_cflags"])


def test_the_build_name_depends_on_source_torch_and_cpu(monkeypatch, tmp_path):
    names = {cpu.build_name(["-O3"]), cpu.build_name(["-O3"]), cpu.build_name(["-O2"])}
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.add(cpu.build_name(["-O3"]))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    names.add(cpu.build_name(["-O3"]))
    shutil.copytree(cpu.SOURCE.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "sampled.cpp")
    assert cpu.build_name(["-O3"]) in names
    for name in ("sampled.cpp", "positions.h"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        names.add(cpu.build_name(["-O3"]))
    assert len(names) == 6


BUILD = """
import torch
from sparse_zero.gradient import cpu
from sparse_zero.gradient.pattern import Pattern
product = cpu.load_operator()
pattern = Pattern(torch.tensor([1, 5, 6]), 8, 8, 4)
rows, columns = torch.ones(20, 8), torch.full((20, 8), 2.0)
result = product(rows, columns, *pattern.by_blocks, 16, 2, 2, torch.float32)
print(torch.backends.cpu.get_cpu_capability(), result.tolist())
"""


def test_two_processes_compile_at_once_for_an_older_cpu_and_a_third_needs_no_compiler(tmp_path):
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", BUILD]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split() for process in both]
    without = environment | {"CXX": "false", "PATH": "", "LD_LIBRARY_PATH": ""}
    third = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert [words[1:] for words in [*said, third.stdout.split()]] == [str([40.0] * 12).split()] * 3, third.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_a_build_does_not_change_the_name_of_the_next(monkeypatch, unbuilt):
    """torch's loader appends to the lists that it gets."""
    names = []

    def load(name, *_, **options):
        names.append(name)
        for value in options.values():
            if isinstance(value, list):
                value.append("-lmore")

    monkeypatch.setattr(cpp_extension, "load", load)
    for _ in range(2):
        cpu.load_operator()
        cpu.load_operator.cache_clear()
    assert len(names) == 2
    assert names[0] == names[1]


def test_an_incomplete_build_is_built_again(monkeypatch, unbuilt):
    built = []
    monkeypatch.setattr(cpp_extension, "load", lambda name, *_, **__: built.append(name))
    assert cpu.load_operator() is not None
    (directory,) = unbuilt.iterdir()
    (directory / f"{directory.name}.so").write_bytes(b"\x7fELF, and no more")
    cpu.load_operator.cache_clear()
    assert cpu.load_operator() is not None
    assert built == [directory.name] * 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)\nand more"), "Ninja is"),
        (RuntimeError("Error building extension\n[1/2] c++ -O3\nsampled.cpp:1: error: no such file"), "no such file"),
        (subprocess.CalledProcessError(1, ["g++"]), "g++"),
        (FileNotFoundError(2, "No such file or directory", "g++"), "g++"),
        (ImportError(), "ImportError"),
    ],
)
def test_without_a_compiler_the_gradient_uses_dense_products(
    monkeypatch, unbuilt, caplog, pattern, operands, error, reason
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setattr(sampled, "cheaper_method", lambda *_: "sampled")
    with caplog.at_level(logging.WARNING):
        found = [sampled.sampled_product(*operands, pattern) for _ in range(2)]
    torch.testing.assert_close(found[0].double(), reference(*operands, pattern), rtol=1e-5, atol=1e-4)
    (record,) = caplog.records
    assert "C++ compiler and ninja" in record.message
    assert reason in record.message
    assert "\n" not in record.message


def test_a_compiler_that_fails(monkeypatch, unbuilt, caplog, pattern, operands):
    monkeypatch.setenv("CXX", "false")
    assert cpu.load_operator() is None
    assert "cannot be compiled" in caplog.text
    assert sampled.sampled_product(*operands, pattern).shape == (200,)


def test_finds_ninja_without_an_activated_environment(monkeypatch, unbuilt):
    seen = []
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: seen.append(os.environ["PATH"]))
    cpu.load_operator()
    assert seen == [f"/usr/bin:{sysconfig.get_path('scripts')}"]
    assert os.environ["PATH"] == "/usr/bin"


def test_the_source_is_in_the_package():
    assert cpu.SOURCE.is_file()
    configuration = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert '"sparse_zero.gradient" = ["csrc/*"]' in configuration
