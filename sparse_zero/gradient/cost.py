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
from types import SimpleNamespace
from typing import Any

import torch

GATHER_TILE = 32
"""Positions of one program of the sampled kernel."""

LINE = 128
"""Bytes that one step of its loop reads of each: more take registers that other programs could use."""

LEAST_ROWS = 16
"""The tensor cores' tile: strips of fewer rows are padded to it."""

PROGRAMS = 384
"""About three for each multiprocessor of an H100."""

STEP_BYTES = 4096
"""Bytes of rows that a step of the strips' loop reads."""

MOST_ROWS = 64
"""Of a strip, whose sums with those of 16 others stay in registers."""

CACHED_BYTES = 16 * 2**20
"""Of the copied columns at a time, which the sampled kernel reads over and over: less than half of an A100's (40 MiB)
or H100's (50 MiB) L2 cache, of which half is near to a processor. Not taken from the device, so that the order of the
sums is the same on every one. Strips read each column a few times only, and gain more from longer pieces."""

MATRIX_FLOPS = {(8, 0): 2048, (8, 6): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
"""Dense bfloat16 or float16 FLOPs per clock and multiprocessor from this compute capability on, from NVIDIA's
architecture whitepapers: A100 312 TFLOP/s = 108 x 1.41 GHz x 2048, H100 SXM 989 = 132 x 1.83 GHz x 4096."""

VECTOR_FLOPS = {(8, 0): 128, (8, 6): 256}
"""The same for float32, without tensor cores (CUDA programming guide, throughput of native arithmetic)."""

TF32_RATE = 0.5
"""TF32 over bfloat16 (A100: 156 of 312 TFLOP/s)."""

CACHE_BYTES = 30
"""Per clock and multiprocessor out of L2, as the sampled kernel reads it on an H100 (an H200: 36)."""

DENSE_SHARE, STRIPS_SHARE, MEMORY_SHARE = 0.72, 0.6, 0.85
"""What is reached on an H100: by a large dense product, of the peak; by strips, of what the sampled kernel reads; of
the memory's bandwidth. These and what follows are fitted to whole gradients (matrices from 512 x 2048 to 11008 x 4096,
2,048 and 8,192 tokens); benchmarks/results/gradient_gpu.md has the choices that are wrong on an H200."""

EXACT_SHARE = 0.25
"""Of the peak without tensor cores, by strips in float32. Not measured."""

LAUNCH_SECONDS = 4e-6
"""What a kernel takes beyond its bytes."""

STEP_SECONDS = 0.3e-6
"""Of the strips' loop, whose steps wait for memory one after another."""

SECTOR = 32
"""Bytes: the least that a GPU reads."""


@dataclass(frozen=True)
class Pieces:
    """How many tokens are copied at a time."""

    width: int
    """Of the copy, a multiple of `block`."""
    block: int

    @classmethod
    def of(cls, N: int, copied: int, dtype: torch.dtype, transient_bytes: int, cached: int = 0) -> "Pieces":
        """Args: copied: columns of the matrices that are copied; cached: those that ought to stay in the cache."""
        room = transient_bytes // (copied * dtype.itemsize)
        if cached:
            room = min(room, CACHED_BYTES // (cached * dtype.itemsize))
        block = min(LINE // dtype.itemsize, max(16, 1 << room.bit_length() >> 1))
        most = max(block, min(room // block, math.ceil(N / block)) * block)
        # As many tokens in each, so that the last one is not mostly filled up
        each = N / max(1, math.ceil(N / most))
        evenly = math.ceil(each / (4 * block)) * 4 * block  # longer steps for strips
        return cls(evenly if 0 < evenly <= most else max(block, math.ceil(each / block) * block), block)


def strips_per_tile(strips: int, blocks: int, granularity: int) -> int:
    """Strips of one program: as many of a block of rows as fill their tiles as well as those of 16 do, but so few that
    there are programs enough to fill a device, and at most 1,024 sums, so that they stay in registers."""
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
    """Whether sampled_triton can compute n positions, and is expected to be faster than the dense product."""
    dtype = torch.promote_types(rows_NR.dtype, columns_NC.dtype)
    if not has_kernels(rows_NR) or dtype.itemsize > 4:
        return False
    (N, R), C = rows_NR.shape, columns_NC.shape[1]
    return is_cheaper(N, R, C, n, dtype, _properties(rows_NR.device), transient_bytes, granularity)


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels can run where the tensor is."""
    if tensor.device.type != "cuda" or torch.version.hip or not _has_triton():
        return False
    return _properties(tensor.device).major >= 8


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _properties(device: torch.device) -> SimpleNamespace:
    """Remembered: the driver takes a millisecond to tell a device's clock rates."""
    found = torch.cuda.get_device_properties(device)
    names = ("major", "minor", "multi_processor_count", "clock_rate", "memory_clock_rate", "memory_bus_width")
    return SimpleNamespace(**{name: getattr(found, name) for name in names if hasattr(found, name)})


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
    """The product, written, and read at the positions."""
    whole = R * C * dtype.itemsize
    chunks = math.ceil(2 * whole / transient_bytes)
    moved = whole + min(whole, n * SECTOR) + 4 * n * (1 + chunks)  # every chunk looks for its positions
    return 2 * N * R * C / (device.flops(dtype) * DENSE_SHARE) + moved / device.memory + 3 * chunks * LAUNCH_SECONDS


def sampled_seconds(N: int, R: int, C: int, n: int, dtype: torch.dtype, device: Speeds, transient_bytes: int) -> float:
    """The copies, and a gather of columns for each position and of rows for each tile and each change of row."""
    launches = 2 * math.ceil(N / Pieces.of(N, R + C, dtype, transient_bytes, cached=C).width)
    copied = 2 * N * (R + C) * dtype.itemsize
    gathered = N * dtype.itemsize * (n + min(n, R + n / GATHER_TILE))
    return copied / device.memory + gathered / device.cache + launches * LAUNCH_SECONDS


def strips_seconds(
    N: int, R: int, C: int, n: int, granularity: int, dtype: torch.dtype, device: Speeds, transient_bytes: int
) -> float:
    """The copy; then what the tiles read, or what they compute if that takes longer."""
    blocks, strips = R // granularity, n // granularity
    launches = 2 * math.ceil(N / Pieces.of(N, C, dtype, transient_bytes).width)
    copied = 2 * N * C * dtype.itemsize
    tiles = math.ceil(strips / blocks / strips_per_tile(strips, blocks, granularity))
    sectors = max(1, SECTOR / (granularity * dtype.itemsize))
    gathered = N * dtype.itemsize * (strips + R * tiles * sectors)
    seconds = max(gathered / (device.cache * STRIPS_SHARE), _strips_steps(N, granularity, dtype) * STEP_SECONDS)
    if dtype == torch.float32:  # which the kernel keeps exact
        seconds = max(seconds, 2 * n * N / (device.single * EXACT_SHARE))
    return copied / device.memory + seconds + launches * LAUNCH_SECONDS


def _strips_steps(N: int, granularity: int, dtype: torch.dtype) -> float:
    return N * max(LEAST_ROWS, granularity) * dtype.itemsize / STEP_BYTES
