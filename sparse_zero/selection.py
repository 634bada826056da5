"""Which scalars of a weight train: pure functions of (seed, parameter name, number of scalars, budget).

Every function is stateless: each rank, each shard and each later load computes the same positions on any device,
so positions are never stored or sent. The rule has a version in its name; changing what it returns means a new name.

stratified-v1: the flattened weight is cut into n blocks whose sizes differ by at most one, and one scalar of each
block is drawn by a fixed integer hash. Exact in count, sorted, any slice at the cost of its length.
"""

import hashlib
import math

import torch

from sparse_zero.errors import UserError

RULE = "stratified-v1"

# The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def positions(
    seed: int,
    name: str,
    numel: int,
    count: int,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Positions [start, stop) of the `count` selected scalars of a weight with `numel` scalars.

    Returns: int64 (stop - start,), strictly increasing, indices into the flattened (row-major) weight.
    """
    stop = count if stop is None else stop
    assert 0 < count <= numel < 2**62, (name, count, numel)
    assert count < 2**31, f"{name}: {count} positions: i * (numel % count) would overflow"
    assert 0 <= start <= stop <= count, (start, stop, count)
    i = torch.arange(start, stop, dtype=torch.int64, device=device)
    size, remainder = divmod(numel, count)
    # floor(i * numel / count) without the 64-bit overflow of i * numel
    block_start = i * size + (i * remainder) // count
    block_stop = (i + 1) * size + ((i + 1) * remainder) // count
    return block_start + _hash(i, stream_key(seed, name)) % (block_stop - block_start)


def stream_key(seed: int, name: str) -> int:
    """A signed 64-bit key for the draws of one parameter."""
    digest = hashlib.sha256(f"{RULE}/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def checksum(flat: torch.Tensor) -> str:
    """A fingerprint of positions: it tells a changed rule from the one that an adapter was trained with."""
    digest = hashlib.sha256()
    for chunk in flat.split(1 << 18):
        digest.update(chunk.cpu().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()[:16]


def _hash(counter: torch.Tensor, key: int) -> torch.Tensor:
    """SplitMix64's output number `counter` of the stream `key`, as a non-negative 63-bit integer."""
    x = (counter + 1) * _GAMMA + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return _shift_right(x ^ _shift_right(x, 31), 1)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch has no uint64 arithmetic, and >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def budget(density: float, total: int, fully_trained: int, sizes: dict[str, int]) -> dict[str, int]:
    """How many scalars of each target train, so that all trainable scalars together are `density` of the model.

    Args: total: scalars of the model; fully_trained: of them, those trained whole (the head);
        sizes: scalars of each target, by parameter name.
    Returns: a count for each target, at least 1, in proportion to its size; the counts add up exactly.
    Raises UserError where the targets are too small, or the head alone is over the budget.
    """
    wanted = round(density * total) - fully_trained
    available = sum(sizes.values())
    if wanted > available:
        raise UserError(
            f"sparse.density: {density:g} of {total:,} scalars is {wanted + fully_trained:,}, but the targets and "
            f"the fully trained modules have {available + fully_trained:,}: lower the density to at most "
            f"{_rounded_down(available + fully_trained, total):.4g}, or add targets"
        )
    if wanted < len(sizes):
        least = -_rounded_down(-fully_trained - len(sizes), total)
        raise UserError(
            f"sparse.density: {density:g} of {total:,} scalars is {wanted + fully_trained:,}, of which the fully "
            f"trained modules take {fully_trained:,}, too few for {len(sizes)} targets: raise the density to at "
            f"least {least:.4g}, or train less of the model whole (modules_to_save)"
        )
    counts, seen = {}, 0
    taken = 0
    for name, size in sizes.items():
        seen += size
        # Cumulative rounding: the counts add up to `wanted` whatever the sizes.
        counts[name] = wanted * seen // available - taken
        taken += counts[name]
    # A tiny weight beside a huge one rounds to nothing; a length of 0 would break ZeRO-3.
    for name in [name for name, n in counts.items() if n == 0]:
        largest = max(counts, key=counts.__getitem__)
        counts[largest] -= 1
        counts[name] = 1
    return counts


def _rounded_down(part: int, total: int) -> float:
    """part / total in four digits, never above it: a density that an error advises must be possible itself."""
    digits = 3 - math.floor(math.log10(abs(part) / total))
    return part * 10**digits // total / 10**digits
