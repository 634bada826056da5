"""Operators in C++ for a CPU, built at first use, as DeepSpeed builds its own: the sampled gradient, for whose sake
they are built, and what else a step does at the selected positions, which torch can do too."""

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

from sparse_zero.ranks.extension_locks import directory_of, remove_abandoned_locks

logger = logging.getLogger(__name__)

TOKENS = 64
"""Of a piece: so many columns of a weight stay in a core's own cache. Measured from 16 to 512 at 768 and 2048."""

SIDE, ROWS_AT_A_TIME = 16, 256
"""As in csrc/sampled.cpp: what the tokens of a piece are a multiple of, and how many rows are turned over at once."""

MOST_GROUPS = 8
"""Of tokens, which have sums of their own. No function of the threads: the sums would then depend on them."""

SOURCE = Path(__file__).parent / "csrc" / "sampled.cpp"

VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
"""Flags by what torch finds a CPU to be capable of, and not those of the machine that compiles: hosts that differ may
share a home directory."""

OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)
"""Apple's compiler does not take it; torch's headers then make loops of one thread."""


class Sizes(NamedTuple):
    """How the operator cuts its work."""

    tokens: int
    """Of a piece."""
    groups: int
    """Of pieces, with sums of their own."""
    threads: int
    """That take part: each has a copy of a piece."""

    @classmethod
    def of(
        cls, N: int, C: int, count: int, granularity: int, dtype: torch.dtype, transient_bytes: int, threads: int
    ) -> "Sizes | None":
        """What keeps sums and copies within a bound, a half for each; None where nothing does.

        Args: N: tokens; C: columns of the weight; count, granularity: of its pattern; dtype: of the sums.
        """
        half = transient_bytes // 2 // dtype.itemsize
        rows = max(ROWS_AT_A_TIME, granularity)
        tokens = min(TOKENS, half // (C + rows) // SIDE * SIDE)
        if not tokens:
            return None
        groups = max(1, min(MOST_GROUPS, -(-N // tokens), half // count))
        return cls(tokens, groups, min(threads, half // ((C + rows) * tokens)))


@functools.cache
def operator() -> Callable[..., torch.Tensor] | None:
    """None where it cannot be built, for instance without a compiler; the log says why.

    Its arguments are: rows (N, R), columns (N, C), what a Pattern holds, what Sizes hold, the dtype of the sums.
    """
    try:
        _load()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "no sampled gradient, but dense products, which take longer: its operator cannot be built (%s). It takes "
            "a C++ compiler and ninja.",
            _reason(error),
        )
        logger.debug("", exc_info=error)
        return None
    return torch.ops.sparse_zero.sampled_product.default


def loaded(tensor: torch.Tensor) -> Any | None:
    """torch.ops.sparse_zero, if a gradient has brought it in and the tensor is on a CPU.

    What it has beside the gradient gives the same bits as torch does, in a fraction of the time; nobody waits for a
    compiler for that.
    """
    here = tensor.device.type == "cpu" and operator.cache_info().currsize > 0 and operator() is not None
    return torch.ops.sparse_zero if here else None


def _load() -> None:
    flags = ["-O3", *OPENMP, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    name = build_name(flags)
    directory = directory_of(name)
    finished = directory / f"{name}.so"
    # torch would lock the directory, and ask ninja and the compiler whether anything is to be done
    if finished.exists() and not (directory / "lock").exists():
        with contextlib.suppress(OSError):  # cut short by a kill: ninja knows, and builds it again
            torch.ops.load_library(finished)
            return
    from torch.utils import cpp_extension  # takes a while

    remove_abandoned_locks()
    directory.mkdir(parents=True, exist_ok=True)
    with _own_programs():
        cpp_extension.load(
            name,
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=[*OPENMP],  # a list of its own, to which torch adds
            build_directory=str(directory),
            is_python_module=False,
        )


def build_name(flags: list[str]) -> str:
    """One for each source, torch and sort of CPU. What other versions have built is left alone."""
    made_of = [SOURCE.read_text(), torch.__version__, str(torch.version.git_version), platform.machine(), *flags]
    return f"sparse_zero_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}"


def _reason(error: Exception) -> str:
    """The compiler's first error, or the first line."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return next((line for line in lines if "error:" in line), lines[0])


@contextmanager
def _own_programs() -> Iterator[None]:
    """With what pip has installed in PATH: ninja, where no virtual environment is activated."""
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = path
