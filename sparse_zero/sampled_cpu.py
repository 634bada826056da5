"""The sampled gradient on a CPU: an operator in C++ that is built at first use, as DeepSpeed builds its own."""

import functools
import logging
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from sparse_zero.pattern import Pattern

logger = logging.getLogger(__name__)

TOKENS = 64
"""Of a piece: so many columns of a weight stay in a core's own cache. Measured from 16 to 512 at 768 and 2048."""

SIDE, ROWS_AT_A_TIME = 16, 256
"""As in csrc/sampled.cpp: what the tokens of a piece are a multiple of, and how many rows are turned over."""

MOST_GROUPS = 8
"""Of tokens, which have sums of their own. No function of the threads, of which the sums would then depend."""

SOURCE = Path(__file__).parent / "csrc" / "sampled.cpp"

FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
"""By what torch finds a CPU to be capable of, and not those of the machine that compiles: hosts that differ may share
a home directory. A name for each keeps their operators apart."""


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
        cls, N: int, C: int, pattern: Pattern, dtype: torch.dtype, transient_bytes: int, threads: int
    ) -> "Sizes | None":
        """What keeps sums and copies within a bound, a half for each; None where nothing does."""
        half = transient_bytes // 2 // dtype.itemsize
        rows = max(ROWS_AT_A_TIME, pattern.granularity)
        tokens = min(TOKENS, half // (C + rows) // SIDE * SIDE)
        if not tokens:
            return None
        groups = max(1, min(MOST_GROUPS, -(-N // tokens), half // pattern.count))
        return cls(tokens, groups, min(threads, half // ((C + rows) * tokens)))


@functools.cache
def operator() -> Callable[..., torch.Tensor] | None:
    """None where it cannot be built, for instance without a compiler; the log says why.

    Its arguments are: rows (N, R), columns (N, C), what a Pattern holds, what Sizes hold, the dtype of the sums.
    """
    from torch.utils import cpp_extension  # takes a while, and only training needs it

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp", *FLAGS.get(capability, [])]
    name = f"sparse_zero_{''.join(filter(str.isalnum, capability)).lower()}"
    try:
        with _own_programs():
            cpp_extension.load(
                name, [str(SOURCE)], extra_cflags=flags, extra_ldflags=["-fopenmp"], is_python_module=False
            )
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "no sampled gradient, but dense products, which take longer: its operator cannot be built (%s). It takes "
            "a C++ compiler and ninja.",
            str(error).strip().splitlines()[0],
        )
        return None
    return torch.ops.sparse_zero.sampled_product.default


@contextmanager
def _own_programs() -> Iterator[None]:
    """With what pip has installed in PATH: ninja, where no virtual environment is activated."""
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = path
