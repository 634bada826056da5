"""A cost model that chooses the fastest method for the sampled gradient on a GPU.

All ranks, and a resumed run, must choose the same method, or their sums would differ in the last bits. Therefore the
choice depends only on shapes and on the properties of the device, not on measured times. benchmarks/gradient_gpu.py
measures the constants and reports wrong choices.

Shapes as in sampled.py: N tokens, an R x C weight, n selected positions, g rows in a strip. triton_kernels.py
describes what its kernels read.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

GATHER_TILE = 32
"""Positions per program of the sampled kernel."""

LINE = 128
"""Bytes of each operand that one step of the sampled kernel's loop reads. More would need registers that other
programs could use."""

MIN_ROWS = 16
"""Size of the tensor cores' tile: strips of fewer rows are padded to it."""

PROGRAMS = 384
"""Number of programs that keep a device busy: about three for each multiprocessor of an H100."""

STEP_BYTES = 4096
"""Bytes of rows that one step of the strips kernel's loop reads."""

MAX_ROWS = 64
"""The longest strip for the strips kernel: the sums of 16 such strips fit into registers."""

CACHED_BYTES = 16 * 2**20
"""Size of the copied columns at a time, which the sampled kernel reads repeatedly: less than half of the L2 cache of
an A100 (40 MiB) or H100 (50 MiB), since each multiprocessor is close to one half only. It does not depend on the
device, so that the order of the sums is the same on all devices. The strips kernel reads each column only a few times,
and longer chunks are faster for it."""

MATRIX_FLOPS = {(8, 0): 2048, (8, 6): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
"""Dense bfloat16 or float16 FLOPs per clock and multiprocessor, by the lowest compute capability that has them, from
NVIDIA's architecture whitepapers: A100 312 TFLOP/s = 108 x 1.41 GHz x 2048, H100 SXM 989 = 132 x 1.83 GHz x 4096."""

VECTOR_FLOPS = {(8, 0): 128, (8, 6): 256}
"""The same for float32 without tensor cores (CUDA programming guide, throughput of native arithmetic)."""

TF32_RATE = 0.5
"""TF32 FLOPs relative to bfloat16 FLOPs (A100: 156 of 312 TFLOP/s)."""

CACHE_BYTES = 30
"""Bytes per clock and multiprocessor that the sampled kernel reads from the L2 cache of an H100 (H200: 36)."""

DENSE_SHARE, STRIPS_SHARE, MEMORY_SHARE = 0.72, 0.6, 0.85
"""Efficiencies on an H100: of a large dense product relative to the peak; of the strips kernel's reads relative to the
sampled kernel's; of memory accesses relative to the peak bandwidth. These and the constants below are fitted to
complete gradients (matrices from 512 x 2048 to 11008 x 4096, 2,048 and 8,192 tokens).
benchmarks/results/gradient_gpu.md lists the wrong choices on an H200."""

EXACT_SHARE = 0.25
"""Efficiency of the strips kernel in float32 relative to the peak without tensor cores. Not measured."""

LAUNCH_SECONDS = 4e-6
"""Overhead of a kernel launch."""

STEP_SECONDS = 0.3e-6
"""Duration of a step of the strips kernel's loop, whose steps wait for memory one after another."""

SECTOR = 32
"""Size of a memory sector in bytes, the smallest read of a GPU."""


@dataclass(frozen=True)
class TokenChunks:
    """The number of tokens that are copied at a time."""

    width: int
    """Tokens in a chunk, a multiple of `block`."""
    block: int
    """Tokens in a tile of the copy, and in a step of the sampled kernel's loop."""

    @classmethod
    def fit(cls, N: int, copied: int, dtype: torch.dtype, transient_bytes: int, cached: int = 0) -> "TokenChunks":
        """The largest chunks that fit into the memory limit, and of about equal size.

        Args:
            N: number of tokens.
            copied: number of columns of the matrices that are copied.
            dtype: dtype of the copies.
            transient_bytes: limit for the size of the copies.
            cached: number of columns that should fit into the L2 cache; 0: ignore the cache.
        """
        room = transient_bytes // (copied * dtype.itemsize)
        if cached:
            room = min(room, CACHED_BYTES // (cached * dtype.itemsize))
        block = min(LINE // dtype.itemsize, max(16, 1 << room.bit_length() >> 1))
        most = max(block, min(room // block, math.ceil(N / block)) * block)
        # About as many tokens in each chunk, so that the last one does not consist mostly of padding
        each = N / max(1, math.ceil(N / most))
        evenly = math.ceil(each / (4 * block)) * 4 * block  # allows longer steps of the strips kernel
        return cls(evenly if 0 < evenly <= most else max(block, math.ceil(each / block) * block), block)


def strips_per_tile(strips: int, blocks: int, granularity: int) -> int:
    """The number of strips per program: 16, 32 or 64.

    The largest tile that needs no more padding than tiles of 16, leaves enough programs to fill a device, and has at
    most 1,024 sums, which fit into registers.

    Args:
        strips: number of selected strips of the weight.
        blocks: number of blocks of rows.
        granularity: number of rows of a strip.
    """
    mean, tile = math.ceil(strips / blocks), 16
    for larger in (32, 64):
        tiles = math.ceil(mean / larger)
        fills = tiles * larger <= math.ceil(mean / 16) * 16
        if fills and blocks * tiles >= PROGRAMS and larger * granularity <= 1024:
            tile = larger
    return tile


def kernel_is_cheaper(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, n: int, granularity: int, transient_bytes: int
) -> bool:
    """Whether a Triton kernel can compute the gradient at n positions, and is expected to beat the dense product.

    Args:
        rows_NR, columns_NC: the operands, (N, R) and (N, C).
        n: number of selected positions.
        granularity: number of rows of a strip.
        transient_bytes: limit for temporary memory.
    """
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if not has_kernels(rows_NR) or dtype.itemsize > 4:
        return False
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    return is_cheaper(N, R, C, n, dtype, _properties(rows_NR.device), transient_bytes, granularity)


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels can run on the tensor's device."""
    if tensor.device.type != "cuda" or torch.version.hip or not _has_triton():
        return False
    return _properties(tensor.device).major >= 8


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _properties(device: torch.device) -> SimpleNamespace:
    """Cached, because the driver needs a millisecond to read a device's clock rates."""
    found = torch.cuda.get_device_properties(device)
    names = ("major", "minor", "multi_processor_count", "clock_rate", "memory_clock_rate", "memory_bus_width")
    return SimpleNamespace(**{name: getattr(found, name) for name in names if hasattr(found, name)})


def is_cheaper(
    N: int, R: int, C: int, n: int, dtype: torch.dtype, properties: Any, transient_bytes: int, granularity: int = 1
) -> bool:
    """Whether a Triton kernel is expected to beat the chunked dense product.

    Args:
        N, R, C, n: shapes as above.
        dtype: dtype of the operands.
        properties: the result of torch.cuda.get_device_properties.
        transient_bytes: limit for temporary memory.
        granularity: 1 for the sampled kernel, the number of rows of a strip for the strips kernel.
    """
    if granularity > MAX_ROWS:
        return False
    # Older devices have no bfloat16. torch before 2.7 does not report the memory speed.
    if (properties.major, properties.minor) < (8, 0) or not hasattr(properties, "memory_bus_width"):
        return False
    device = Speeds.of(properties)
    dense = dense_seconds(N, R, C, n, dtype, device, transient_bytes)
    if granularity == 1:
        return sampled_seconds(N, R, C, n, dtype, device, transient_bytes) < dense
    return strips_seconds(N, R, C, n, granularity, dtype, device, transient_bytes) < dense


@dataclass(frozen=True)
class Speeds:
    """Speeds of a device in bytes or FLOPs per second."""

    memory: float
    """Expected bandwidth of the memory."""
    cache: float
    """Expected bandwidth of the L2 cache."""
    half: float
    """Peak FLOPs of tensor cores in bfloat16 or float16."""
    single: float
    """Peak FLOPs in float32 without tensor cores."""

    @classmethod
    def of(cls, properties: Any) -> "Speeds":
        capability = (properties.major, properties.minor)
        clocks = properties.multi_processor_count * properties.clock_rate * 1e3
        half, single = (
            clocks * flops[max(known for known in flops if known <= capability)]
            for flops in (MATRIX_FLOPS, VECTOR_FLOPS)
        )
        # Two transfers per clock
        memory = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
        return cls(memory * MEMORY_SHARE, clocks * CACHE_BYTES, half, single)

    def flops(self, dtype: torch.dtype) -> float:
        """Peak FLOPs of torch's matrix product."""
        if dtype != torch.float32:
            return self.half
        return self.half * TF32_RATE if _allows_tf32() else self.single


def _allows_tf32() -> bool:
    # The older name, allow_tf32, raises if the newer one, which exists since torch 2.9, has been set
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def dense_seconds(N: int, R: int, C: int, n: int, dtype: torch.dtype, device: Speeds, transient_bytes: int) -> float:
    """Expected duration of the dense product, which is written to memory and read at the positions."""
    whole = R * C * dtype.itemsize
    chunks = math.ceil(2 * whole / transient_bytes)
    moved = whole + min(whole, n * SECTOR) + 4 * n * (1 + chunks)  # each chunk searches for its positions
    return 2 * N * R * C / (device.flops(dtype) * DENSE_SHARE) + moved / device.memory + 3 * chunks * LAUNCH_SECONDS


def sampled_seconds(N: int, R: int, C: int, n: int, dtype: torch.dtype, device: Speeds, transient_bytes: int) -> float:
    """Expected duration of the sampled kernel: the copies, and the reads of columns and rows.

    A column is read for each position; a row is read for each tile and each change of row.
    """
    launches = 2 * math.ceil(N / TokenChunks.fit(N, R + C, dtype, transient_bytes, cached=C).width)
    copied = 2 * N * (R + C) * dtype.itemsize
    gathered = N * dtype.itemsize * (n + min(n, R + n / GATHER_TILE))
    return copied / device.memory + gathered / device.cache + launches * LAUNCH_SECONDS


def strips_seconds(
    N: int, R: int, C: int, n: int, granularity: int, dtype: torch.dtype, device: Speeds, transient_bytes: int
) -> float:
    """Expected duration of the strips kernel: the copy, and the tiles' reads or, if slower, their arithmetic."""
    blocks, strips = R // granularity, n // granularity
    launches = 2 * math.ceil(N / TokenChunks.fit(N, C, dtype, transient_bytes).width)
    copied = 2 * N * C * dtype.itemsize
    tiles = math.ceil(strips / blocks / strips_per_tile(strips, blocks, granularity))
    sectors = max(1, SECTOR / (granularity * dtype.itemsize))
    gathered = N * dtype.itemsize * (strips + R * tiles * sectors)
    seconds = max(gathered / (device.cache * STRIPS_SHARE), _strips_steps(N, granularity, dtype) * STEP_SECONDS)
    if dtype == torch.float32:  # the kernel does not use TF32
        seconds = max(seconds, 2 * n * N / (device.single * EXACT_SHARE))
    return copied / device.memory + seconds + launches * LAUNCH_SECONDS


def _strips_steps(N: int, granularity: int, dtype: torch.dtype) -> float:
    return N * max(MIN_ROWS, granularity) * dtype.itemsize / STEP_BYTES
