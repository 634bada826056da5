"""What selection rules draw, in Python's unbounded integers."""

import hashlib
import itertools

import torch


def hashes(rule: str, seed: int, name: str, count: int) -> list[int]:
    """SplitMix64 in Python's unbounded integers: 63 bits each."""
    key = int.from_bytes(hashlib.sha256(f"{rule}/{seed}/{name}".encode()).digest()[:8], "little")
    found = []
    for i in range(count):
        x = (key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append((x ^ (x >> 31)) >> 1)
    return found


def blockwise(rule: str, seed: int, name: str, size: int, count: int) -> list[int]:
    """One of each of `count` equal blocks, of `size` indices."""
    edges = [i * size // count for i in range(count + 1)]
    drawn = hashes(rule, seed, name, count)
    return [start + h % (stop - start) for h, (start, stop) in zip(drawn, itertools.pairwise(edges), strict=True)]


def sha256(drawn: torch.Tensor) -> str:
    return hashlib.sha256(drawn.numpy().astype("<i8").tobytes()).hexdigest()[:16]
