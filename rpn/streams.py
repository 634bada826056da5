"""Where the random numbers of a disturbed forward come from: stateless streams, one per place in the training.

A stream is a pure function of (seed, step, micro-step, pass, rank), so shards are independent and a resumed run meets
the noise that the interrupted one would have met. With scope "sequence" every example has its own stream, keyed by
its place in the global batch instead of the rank: 1, 2 and 4 ranks then draw the same noise for the same example.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, eq=False)
class Groups:
    """The tokens that noise may touch, gathered into groups; each group draws its noise from its own key."""

    rows: Tensor
    """int64 (tokens,): indices into the flattened (batch * length) tokens, group after group."""

    lengths: Tensor
    """int64 (groups,): tokens of each group, at least one."""

    keys: Tensor
    """int64 (groups,): the key of each group's stream."""

    common_key: int
    """What all groups of this forward share."""

    tokens: int
    """Tokens of the micro-batch, batch * length, whether they may be disturbed or not."""

    def index_of_rows(self) -> Tensor:
        """int64 (tokens,): the group of each of `rows`."""
        number = torch.arange(len(self.lengths), device=self.lengths.device)
        return number.repeat_interleave(self.lengths, output_size=len(self.rows))

    def starts(self) -> Tensor:
        """int64 (groups,): where each group begins in `rows`."""
        return self.lengths.cumsum(0) - self.lengths


@dataclass(frozen=True, eq=False)
class Stream:
    """One forward's place in the training. A user's own noise may use `key`, `groups` or nothing of it."""

    seed: int = 0
    step: int = 0
    """The optimizer step."""
    micro_step: int = 0
    """The micro-batch within the optimizer step, under gradient accumulation."""
    pass_index: int = 0
    """The noisy pass over this micro-batch, from 0."""
    rank: int = 0
    world_size: int = 1
    """Data-parallel rank and number of ranks: rank r holds the r-th micro-batch of every micro-step."""
    scope: str = "batch"
    """"batch" or "sequence": whether examples share one group."""
    pieces: Tensor | None = None
    """int64 (batch, length): the number, within its row, of the packed piece that each token belongs to."""

    @property
    def key(self) -> int:
        """The key of the whole forward on this rank, a signed 64-bit integer."""
        return stream_key(self.seed, self.step, self.pass_index, self.micro_step, self.rank)

    def groups(self, keep: Tensor, per_example: bool = False) -> Groups:
        """Groups the tokens that may be disturbed: as `scope` says, or per example whatever the scope.

        keep: bool (batch, length), False where no noise may go. A packed piece counts as an example.
        With scope "sequence" an example's key depends neither on the padding of its micro-batch nor on the rank that
        holds it: its place in the global batch is (micro_step * world_size + rank) * batch + row.
        """
        batch, length = keep.shape
        rows = keep.flatten().nonzero().squeeze(1)
        if self.scope == "batch" and not per_example:
            lengths = torch.full((min(len(rows), 1),), len(rows), device=keep.device)
            return Groups(rows, lengths, torch.full_like(lengths, self.key), self.key, batch * length)
        piece = 0 if self.pieces is None else self.pieces.flatten()[rows]
        # a piece holds at least one token, so its number stays below `length`
        name = rows // length * length + piece
        names, lengths = torch.unique_consecutive(name, return_counts=True)
        row, piece = names // length, names % length
        if self.scope == "batch":
            return Groups(rows, lengths, mix(self.key, mix(row, piece)), self.key, batch * length)
        place = (self.micro_step * self.world_size + self.rank) * batch + row
        common_key = stream_key(self.seed, self.step, self.pass_index)
        return Groups(rows, lengths, mix(common_key, mix(place, piece)), common_key, batch * length)


def stream_key(*coordinates: int) -> int:
    """A signed 64-bit key for integer coordinates; each sequence of coordinates has a key of its own."""
    digest = hashlib.sha256("/".join(map(str, coordinates)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def mix(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """A 64-bit hash of each pair (key, counter), broadcast; equal on every device. At least one is int64 tensor."""
    x = key + (_signed(counter * _GAMMA) if isinstance(counter, int) else counter * _GAMMA)
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def integers(key: Tensor | int, counter: Tensor | int, bound: Tensor | int) -> Tensor:
    """Integers in [0, bound), bound < 2**31: the counter-th draw of each key. The bias is below bound / 2**32."""
    return (_shift(mix(key, counter), 32) * bound) >> 32


def uniforms(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """float64 in [0, 1): the counter-th draw of each key."""
    return _shift(mix(key, counter), 11).double() * 2.0**-53


def _signed(number: int) -> int:
    """What 64-bit arithmetic makes of a Python integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros: torch's >> copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
