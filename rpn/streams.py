"""Stateless random streams for the noise, one for each position in the training.

A stream is a pure function of (seed, step, micro-step, pass, rank). So the ranks' noises are independent, and a
resumed run has the noise that the interrupted run would have had. With scope "sequence" each example has its own
stream, keyed by its position in the global batch instead of the rank: the same example gets the same noise for any
number of ranks.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# Constants of SplitMix64's finalizer (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, eq=False)
class Groups:
    """The tokens that may get noise, in groups. The noise of each group has its own random key."""

    rows: Tensor
    """int64 (tokens,): indices into the flattened (batch * length) tokens, group after group."""

    lengths: Tensor
    """int64 (groups,): number of tokens of each group, at least one."""

    keys: Tensor
    """int64 (groups,): random key of each group."""

    common_key: int
    """A random key that all groups of this forward share."""

    tokens: int
    """Number of tokens of the micro-batch, batch * length, with or without noise."""

    def index_of_rows(self) -> Tensor:
        """int64 (tokens,): the number of the group of each entry of `rows`."""
        number = torch.arange(len(self.lengths), device=self.lengths.device)
        return number.repeat_interleave(self.lengths, output_size=len(self.rows))

    def starts(self) -> Tensor:
        """int64 (groups,): the offset of each group in `rows`."""
        return self.lengths.cumsum(0) - self.lengths


@dataclass(frozen=True, eq=False)
class Stream:
    """The position of a forward in the training, and its random keys. A custom noise may use `key` or `groups`."""

    seed: int = 0
    step: int = 0
    """The optimizer step."""
    micro_step: int = 0
    """The micro-batch within the optimizer step, under gradient accumulation."""
    pass_index: int = 0
    """The noisy pass over this micro-batch, from 0."""
    rank: int = 0
    world_size: int = 1
    """Data-parallel rank and world size: rank r has the r-th micro-batch of every micro-step."""
    scope: str = "batch"
    """"batch": all examples form one group; "sequence": one group for each example."""
    pieces: Tensor | None = None
    """int64 (batch, length): the number of each token's packed sequence in its row; None without packing."""

    @property
    def key(self) -> int:
        """The random key of this forward on this rank, a signed 64-bit integer."""
        return stream_key(self.seed, self.step, self.pass_index, self.micro_step, self.rank)

    def groups(self, keep: Tensor, per_example: bool = False) -> Groups:
        """Group the tokens that may get noise.

        With scope "sequence" the key of an example depends on its position in the global batch,
        (micro_step * world_size + rank) * batch + row, and not on the padding or on the number of ranks.

        Args:
            keep: bool (batch, length), False where no noise is allowed.
            per_example: one group for each example, whatever the scope. A packed sequence counts as an example.
        """
        batch, length = keep.shape
        rows = keep.flatten().nonzero().squeeze(1)
        if self.scope == "batch" and not per_example:
            lengths = torch.full((min(len(rows), 1),), len(rows), device=keep.device)
            return Groups(rows, lengths, torch.full_like(lengths, self.key), self.key, batch * length)
        piece = 0 if self.pieces is None else self.pieces.flatten()[rows]
        # A packed sequence has at least one token, so its number is less than `length`
        name = rows // length * length + piece
        names, lengths = torch.unique_consecutive(name, return_counts=True)
        row, piece = names // length, names % length
        if self.scope == "batch":
            return Groups(rows, lengths, mix(self.key, mix(row, piece)), self.key, batch * length)
        position = (self.micro_step * self.world_size + self.rank) * batch + row
        common_key = stream_key(self.seed, self.step, self.pass_index)
        return Groups(rows, lengths, mix(common_key, mix(position, piece)), common_key, batch * length)


def stream_key(*coordinates: int) -> int:
    """A signed 64-bit random key for a sequence of integers; different sequences have different keys."""
    digest = hashlib.sha256("/".join(map(str, coordinates)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def mix(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """A 64-bit hash of each pair (key, counter), the same on all devices. One of them must be an int64 tensor."""
    x = key + (_signed(counter * _GAMMA) if isinstance(counter, int) else counter * _GAMMA)
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def integers(key: Tensor | int, counter: Tensor | int, bound: Tensor | int) -> Tensor:
    """Random integers in [0, bound) by key and counter, for bound < 2**31. Their bias is less than bound / 2**32."""
    return (_shift(mix(key, counter), 32) * bound) >> 32


def uniforms(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """Random float64 numbers in [0, 1) by key and counter."""
    return _shift(mix(key, counter), 11).double() * 2.0**-53


def _signed(number: int) -> int:
    """A Python integer modulo 2**64, as a signed integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
