"""C++ operators for CPUs, compiled at first use, as DeepSpeed compiles its own operators.

They are compiled for the sampled gradient. They also include other operations of a step at the selected positions,
which torch can do as well, but more slowly.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_zero.ranks.extension_locks import build_directory, remove_abandoned_locks

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 64
"""Number of tokens in a chunk, so that the columns of a chunk fit into a core's own cache. Measured from 16 to 512
tokens at 768 and 2048 columns."""

TILE, CHUNK_ROWS = 16, 256
"""As in csrc/sampled.cpp: the number of tokens in a chunk is a multiple of TILE, and CHUNK_ROWS rows are transposed at
a time."""

MAX_GROUPS = 8
"""Limit for the number of groups of tokens that have separate sums. It must not depend on the number of threads, or
the result would."""

SOURCE = Path(__file__).parent / "csrc" / "sampled.cpp"

VECTOR_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
"""Compiler flags by the CPU capability that torch reports. The compiler's own detection (-march=native) is not used,
because different hosts may share a home directory."""

OPENMP_FLAGS = () if sys.platform == "darwin" else ("-fopenmp",)
"""Apple's compiler does not support it. Without it, loops in torch's headers use one thread."""


class Tiling(NamedTuple):
    """How the operator divides its work."""

    tokens: int
    """Number of tokens in a chunk."""
    groups: int
    """Number of groups of chunks that have separate sums."""
    threads: int
    """Number of threads, each of which has a copy of a chunk."""

    @classmethod
    def fit(
        cls, N: int, C: int, count: int, granularity: int, dtype: torch.dtype, transient_bytes: int, threads: int
    ) -> "Tiling | None":
        """The tiling that keeps temporary memory within a limit: sums and copies get half of it each.

        Args:
            N: number of tokens.
            C: number of columns of the weight.
            count: number of selected scalars.
            granularity: number of rows of a strip.
            dtype: dtype of the sums.
            transient_bytes: limit for temporary memory.
            threads: largest number of threads.

        Returns:
            None if the limit is too small for any tiling.
        """
        half = transient_bytes // 2 // dtype.itemsize
        rows = max(CHUNK_ROWS, granularity)
        tokens = min(CHUNK_TOKENS, half // (C + rows) // TILE * TILE)
        if not tokens:
            return None
        groups = max(1, min(MAX_GROUPS, -(-N // tokens), half // count))
        return cls(tokens, groups, min(threads, half // ((C + rows) * tokens)))


@functools.cache
def load_operator() -> Callable[..., torch.Tensor] | None:
    """The operator for the sampled gradient, compiled if necessary.

    Its arguments are: rows (N, R), columns (N, C), the members of `Pattern.by_blocks`, those of a Tiling, and the
    dtype of the sums.

    Returns:
        None if it cannot be compiled, for instance without a compiler. The log gives the reason.
    """
    try:
        _load()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "the C++ operator of the sampled gradient cannot be compiled (%s): dense products, which are slower, are "
            "used instead. Install a C++ compiler and ninja.",
            _reason(error),
        )
        logger.debug("", exc_info=error)
        return None
    return torch.ops.sparse_zero.sampled_product.default


def loaded_operators(tensor: torch.Tensor) -> Any | None:
    """torch.ops.sparse_zero if a gradient has already loaded it and the tensor is on a CPU, else None.

    The other operators give the same bits as torch in a fraction of the time, but are not worth a compilation.
    """
    on_cpu = tensor.device.type == "cpu"
    is_loaded = on_cpu and load_operator.cache_info().currsize > 0 and load_operator() is not None
    return torch.ops.sparse_zero if is_loaded else None


def _load() -> None:
    flags = ["-O3", *OPENMP_FLAGS, *VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]
    name = build_name(flags)
    directory = build_directory(name)
    finished = directory / f"{name}.so"
    # torch's loader would lock the directory and run ninja and the compiler
    if finished.exists() and not (directory / "lock").exists():
        with contextlib.suppress(OSError):  # an incomplete file of a killed compilation: ninja builds it again
            torch.ops.load_library(finished)
            return
    from torch.utils import cpp_extension  # a slow import

    remove_abandoned_locks()
    directory.mkdir(parents=True, exist_ok=True)
    with _installed_scripts_in_path():
        cpp_extension.load(
            name,
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=[*OPENMP_FLAGS],  # a new list, because torch appends to it
            build_directory=str(directory),
            is_python_module=False,
        )


def build_name(flags: list[str]) -> str:
    """A name that depends on the sources, torch's version, the CPU's architecture and the compiler flags.

    Builds of other versions are kept.
    """
    sources = [file.read_text() for file in sorted(SOURCE.parent.glob("*.[ch]*"))]
    parts = [*sources, torch.__version__, str(torch.version.git_version), platform.machine(), *flags]
    return f"sparse_zero_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _reason(error: Exception) -> str:
    """The compiler's first error, or the first line of the message."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return next((line for line in lines if "error:" in line), lines[0])


@contextmanager
def _installed_scripts_in_path() -> Iterator[None]:
    """Add the directory of pip's scripts to PATH: it contains ninja, also if no virtual environment is activated."""
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = path
