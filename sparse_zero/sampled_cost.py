"""Which way to the sampled gradient a GPU is expected to take least time for: a model in place of a measurement.

All ranks, and a run that is resumed, must choose alike, or their sums would differ in the last bits: so nothing is
timed here, and the answer follows from shapes and the device's properties. benchmarks/gradient_gpu.py measures the
constants, and where the answers are wrong.

Shapes as in sampled_gradient.py: N tokens, R x C the weight, n positions; g the rows of a strip. See
sampled_triton.py for what its kernels read.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

GATHER_TILE = 32
"""Positions of one program of the sampled kernel."""

LINE = 256
"""Bytes that one step of its loop reads of each: more take registers that other programs could use."""

MOST_ROWS = 64
"""Of a strip, whose sums with those of 16 others stay in registers."""

CACHED_BYTES = 16 * 2**20
"""Of the copied columns at a time: less than half of an A100's (40 MiB) or H100's (50 MiB) L2 cache, of which half is
near to a processor. Not taken from the device, so that the order of the sums is the same on every one."""

MATRIX_FLOPS = {(8, 0): 2048, (8, 6): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
"""Dense bfloat16 or float16 FLOPs per clock and multiprocessor from this compute capability on, from NVIDIA's
architecture whitepapers: A100 312 TFLOP/s = 108 x 1.41 GHz x 2048, H100 SXM 989 = 132 x 1.83 GHz x 4096."""

VECTOR_FLOPS = {(8, 0): 128, (8, 6): 256}
"""The same for float32, without tensor cores (CUDA programming guide, throughput of native arithmetic)."""

TF32_RATE = 0.5
"""TF32 over bfloat16 (A100: 156 of 312 TFLOP/s)."""

CACHE_BYTES = 24
"""Per clock and multiprocessor out of L2: half of the 5,120 that the A100 whitepaper gives for its 108 together. Not
yet measured with these kernels."""

DENSE_SHARE, STRIPS_SHARE, MEMORY_SHARE = 0.75, 0.25, 0.85
"""What is reached of the peaks: by a large dense product; by the small tiles of strips; of the memory's bandwidth."""

LAUNCH_SECONDS = 5e-6
"""From one kernel to the next."""

SECTOR = 32
"""Bytes: the least that a GPU reads."""


@dataclass(frozen=True)
class Pieces:
    """How many tokens are copied at a time."""

    width: int
    """Of the copy, a multiple of `block`."""
    block: int

    @classmethod
    def of(cls, N: int, copied: int, gathered: int, dtype: torch.dtype, transient_bytes: int) -> "Pieces":
        """Args: copied: columns of the matrices that are copied; gathered: those that ought to stay in the cache."""
        room = min(transient_bytes // (copied * dtype.itemsize), CACHED_BYTES // (gathered * dtype.itemsize))
        block = min(LINE // dtype.itemsize, max(16, 1 << room.bit_length() >> 1))
        return cls(max(block, min(room // block, math.ceil(N / block)) * block), block)


def strips_per_tile(strips: int, blocks: int, granularity: int) -> int:
    """Strips of one program: about half of what a block of rows holds, so that there are programs enough, and at most
    1,024 sums, so that they stay in registers."""
    mean = math.ceil(strips / blocks)
    return max(16, min(64, 1024 // granularity, (1 << (mean - 1).bit_length()) // 2))


def kernel_is_cheaper(
    rows_NR: torch.Tensor, columns_NC: torch.Tensor, n: int, granularity: int, transient_bytes: int
) -> bool:
    """Whether sampled_triton can compute n positions, and is expected to be faster than the dense product."""
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if rows_NR.device.type != "cuda" or torch.version.hip or dtype.itemsize > 4 or not _has_triton():
        return False
    properties = torch.cuda.get_device_properties(rows_NR.device)
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    return is_cheaper(N, R, C, n, dtype, properties, transient_bytes, granularity)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_cheaper(
    N: int, R: int, C: int, n: int, dtype: torch.dtype, properties: Any, transient_bytes: int, granularity: int = 1
) -> bool:
    """Whether sampled_triton's kernel is expected to beat the chunked dense product.

    Args: properties: torch.cuda.get_device_properties; granularity: 1 for `sampled`, g for `strips`.
    """
    if granularity > MOST_ROWS:
        return False
    # Older ones have no bfloat16, and torch before 2.7 does not tell the speed of the memory
    if (properties.major, properties.minor) < (8, 0) or not hasattr(properties, "memory_bus_width"):
        return False
    device = Speeds.of(properties)
    dense = dense_seconds(N, R, C, n, dtype, device, transient_bytes)
    if granularity == 1:
        return sampled_seconds(N, R, C, n, dtype, device, transient_bytes) < dense
    return strips_seconds(N, R, C, n, granularity, dtype, device, transient_bytes) < dense


@dataclass(frozen=True)
class Speeds:
    """Peaks of a device: bytes and FLOPs per second."""

    memory: float
    cache: float
    half: float
    single: float

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
        """Of a matrix product of torch's."""
        if dtype != torch.float32:
            return self.half
        return self.half * TF32_RATE if _allows_tf32() else self.single


def _allows_tf32() -> bool:
    # Of these two names the older raises where somebody has used the newer, which torch has from 2.9 on
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def dense_seconds(N: int, R: int, C: int, n: int, dtype: torch.dtype, device: Speeds, transient_bytes: int) -> float:
    """The product, written, and read at the positions, whose indices into it take about 40 bytes each."""
    chunks = math.ceil(R * C * dtype.itemsize / transient_bytes)
    whole = R * C * dtype.itemsize
    moved = whole + min(whole, n * SECTOR) + 40 * n
    return 2 * N * R * C / (device.flops(dtype) * DENSE_SHARE) + moved / device.memory + 6 * chunks * LAUNCH_SECONDS


def sampled_seconds(N: int, R: int, C: int, n: int, dtype: torch.dtype, device: Speeds, transient_bytes: int) -> float:
    """The copies, and a gather of columns for each position and of rows for each tile and each change of row."""
    launches = 3 * math.ceil(N / Pieces.of(N, R + C, C, dtype, transient_bytes).width)
    copied = 2 * N * (R + C) * dtype.itemsize
    gathered = N * dtype.itemsize * (n + min(n, R + n / GATHER_TILE))
    return copied / device.memory + gathered / device.cache + launches * LAUNCH_SECONDS


def strips_seconds(
    N: int, R: int, C: int, n: int, granularity: int, dtype: torch.dtype, device: Speeds, transient_bytes: int
) -> float:
    """The copy; then what the tiles read, or what they compute if that takes longer."""
    blocks, strips = R // granularity, n // granularity
    launches = 2 * math.ceil(N / Pieces.of(N, C, C, dtype, transient_bytes).width)
    copied = 2 * N * C * dtype.itemsize
    tiles = math.ceil(strips / blocks / strips_per_tile(strips, blocks, granularity))
    sectors = max(1, SECTOR / (granularity * dtype.itemsize))
    gathered = N * dtype.itemsize * (strips + R * tiles * sectors)
    # The kernel keeps float32 exact
    flops = device.single if dtype == torch.float32 else device.half
    computed = 2 * n * N / (flops * STRIPS_SHARE)
    return copied / device.memory + max(gathered / device.cache, computed) + launches * LAUNCH_SECONDS
