"""Integer hashes that draw positions: the same on every rank, on every device and in every version."""

import hashlib

import torch

# Constants of SplitMix64's finalizer (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def stream_key(seed: int, name: str, rule: str) -> int:
    """A signed 64-bit hash key for the random numbers of one parameter."""
    digest = hashlib.sha256(f"{rule}/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def stratified_draw(
    key: int, size: int, count: int, start: int, stop: int, device: torch.device | str
) -> torch.Tensor:
    """Cut `size` indices into `count` blocks whose sizes differ by at most one, and draw an index from each.

    Args:
        key: what the random numbers depend on, from `stream_key`.
        size: at least `count`.
        start, stop: the blocks [start, stop) to draw from.

    Returns:
        int64 (stop - start,), sorted.
    """
    assert 0 < count <= size < 2**62, (count, size)
    assert 0 <= start <= stop <= count, (start, stop, count)
    if count == size:
        return torch.arange(start, stop, dtype=torch.int64, device=device)
    assert count < 2**31, f"{count} positions: i * (size % count) would overflow"
    i = torch.arange(start, stop + 1, dtype=torch.int64, device=device)
    edges = block_start(i, size, count)
    return in_block(i[:-1], edges[:-1], edges.diff(), key)


def block_start(i: torch.Tensor, numel: int, count: int) -> torch.Tensor:
    """floor(i * numel / count), computed without a 64-bit overflow of i * numel."""
    size, remainder = divmod(numel, count)
    # Truncation is several times faster than `//`, and equal to it for positive numbers
    return torch.div(i * remainder, count, rounding_mode="trunc").add_(i, alpha=size)


def in_block(i: torch.Tensor, first: torch.Tensor, size: torch.Tensor, key: int) -> torch.Tensor:
    """A random position in each block i, given the first position and the size of each block."""
    return hashed(i, key).remainder_(size).add_(first)


def hashed(counter: torch.Tensor, key: int) -> torch.Tensor:
    """Output number `counter` of SplitMix64 with seed `key`, as a non-negative 63-bit integer."""
    x = (counter + 1).mul_(_GAMMA).add_(key)
    scratch = torch.empty_like(x)
    x.bitwise_xor_(_shift_right(x, 30, scratch)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27, scratch)).mul_(_MIX_2)
    x.bitwise_xor_(_shift_right(x, 31, scratch))
    return _shift_right(x, 1, x)


def _shift_right(x: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Logical right shift. torch has no uint64 arithmetic, and >> on int64 copies the sign bit."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)
