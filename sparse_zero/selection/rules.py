"""Which scalars of a weight train: pure functions of (seed, parameter name, shape, budget).

Positions are int64 indices into the flattened (row-major) weight, strictly increasing. What the rules below draw is
the same on every rank, on any device and in every later version, so it is neither sent nor stored. A rule has a
version in its name; changing what it returns means a new name.

stratified-v1: the weight is cut into n blocks whose sizes differ by at most one, and one scalar of each block is drawn
    by a fixed integer hash. Exact in count, any slice at the cost of its length. With granularity g the same is done
    with strips of g consecutive rows of one column.
bernoulli-v1: each scalar is drawn with probability p, independently (the paper's). Its count is random, so a slice
    costs a walk over the weight before it.
stored: positions that no rule regenerates (the largest scalars of a pretrained weight, a caller's own); adapters
    carry them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import xxhash

from sparse_zero.selection.threads import PIECE

STRATIFIED, BERNOULLI, STORED = "stratified-v1", "bernoulli-v1", "stored"

SHARED_CHUNK = 1 << 16
"""Positions at a time where torch's threads share them out: the arithmetic stays in the processor's cache."""
ACCELERATOR_CHUNK = 1 << 20

# The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class Draw:
    """What was drawn from one weight: equal draws have equal positions."""

    rule: str
    name: str
    shape: tuple[int, ...]
    count: int
    seed: int = 0
    probability: float | None = None
    """bernoulli-v1: of each scalar."""
    granularity: int = 1
    """stratified-v1: rows of a strip."""
    whole_rows: tuple[int, ...] = ()
    """Rows of a matrix that are selected whole, sorted (new tokens); the rule draws from the others."""

    @classmethod
    def bernoulli(
        cls, name: str, shape: tuple[int, ...], probability: float, seed: int, whole_rows: tuple[int, ...] = ()
    ) -> "Draw":
        """Counts what the rule draws, which takes a walk over the weight."""
        columns = shape[-1]
        numel = torch.Size(shape).numel() - len(whole_rows) * columns
        drawn = sum(chunk.numel() for chunk in bernoulli_chunks(seed, name, numel, probability))
        return cls(BERNOULLI, name, shape, drawn + len(whole_rows) * columns, seed, probability, whole_rows=whole_rows)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def strip_count(self) -> int:
        """The indices that tell the positions: one for each strip."""
        return self.count // self.granularity

    @property
    def strip_dtype(self) -> torch.dtype:
        """The narrowest that holds them."""
        return torch.int32 if self.numel // self.granularity < 2**31 else torch.int64

    @property
    def repeatable(self) -> bool:
        """Whether the positions can be drawn again."""
        return self.rule != STORED

    @property
    def has_slices(self) -> bool:
        """Whether some of the positions can be drawn without those before them."""
        return self.rule == STRATIFIED and not self.whole_rows

    @property
    def in_whole_rows(self) -> int:
        """How many of the positions are those of whole rows."""
        return len(self.whole_rows) * self.shape[-1] if self.whole_rows else 0

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns: int64 (count,). Raises ValueError for the rule "stored", which cannot be drawn again."""
        if self.rule == STORED:
            raise ValueError(f"{self.name}: stored positions cannot be drawn again")
        if self.whole_rows:
            return self._with_whole_rows(device)
        if self.rule == BERNOULLI:
            return torch.cat([*self.chunks(device)])
        flat = torch.empty(self.count, dtype=torch.int64, device=device)
        for start in range(0, self.count, SHARED_CHUNK):
            piece = flat[start : start + SHARED_CHUNK]
            piece.copy_(self.slice(start, start + piece.numel(), device))
        return flat

    def strip_chunks(
        self, device: torch.device | str = "cpu", start: int = 0, stop: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Strips [start, stop), some at a time. One index for each: cells of the grid of blocks of rows by columns,
        flattened; positions where strips are single scalars.

        Yields: int64, sorted. Raises ValueError as `positions` does. A rule without slices walks over all.
        """
        stop = self.strip_count if stop is None else stop
        if self.has_slices:
            for first, last in _cuts(start, stop, _chunk_size(device)):
                grid = self.numel // self.granularity
                yield positions(self.seed, self.name, grid, self.strip_count, first, last, device)
            return
        first = 0
        for chunk in self.chunks(device):
            if first >= stop:
                return
            yield chunk[max(0, start - first) : max(0, stop - first)]
            first += chunk.numel()

    def chunks(self, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
        """All positions in order, some at a time. Raises ValueError as `positions` does."""
        if self.whole_rows or self.rule == STORED:
            yield from in_chunks(self.positions(device))
        elif self.rule == BERNOULLI:
            yield from bernoulli_chunks(self.seed, self.name, self.numel, self.probability, device)
        else:
            for start, stop in _cuts(0, self.count, _chunk_size(device)):
                yield self.slice(start, stop, device)

    def slice(self, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Positions [start, stop) of stratified-v1, at the cost of their number."""
        assert self.has_slices, self
        if self.granularity > 1:
            return strips(self.seed, self.name, self.shape, self.count, self.granularity, start, stop, device)
        return positions(self.seed, self.name, self.numel, self.count, start, stop, device)

    def _with_whole_rows(self, device: torch.device | str) -> torch.Tensor:
        """The rule draws from the weight without these rows."""
        columns = self.shape[-1]
        rows = torch.tensor(self.whole_rows, device=device)
        if self.count == self.in_whole_rows:
            return whole_rows(rows, columns)
        others = (self.shape[0] - len(self.whole_rows), columns)
        drawn = Draw(self.rule, self.name, others, self.count - self.in_whole_rows, self.seed, self.probability)
        flat = drawn.positions(device)
        # Row k of the others is the k-th row that is not taken whole.
        row = torch.div(flat, columns, rounding_mode="trunc")
        skipped = torch.searchsorted(rows - torch.arange(rows.numel(), device=device), row, right=True)
        return torch.cat([flat + skipped * columns, whole_rows(rows, columns)]).sort().values


def in_chunks(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """Positions that are at hand, as Draw.chunks gives those that are drawn."""
    return iter(flat.split(_chunk_size(flat.device)))


def whole_rows(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Every position of some rows of a matrix. Returns: int64 (rows * columns,)."""
    return (rows[:, None] * columns + torch.arange(columns, device=rows.device)).flatten()


def positions(
    seed: int,
    name: str,
    numel: int,
    count: int,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """stratified-v1: positions [start, stop) of the `count` selected scalars of a weight with `numel` scalars.

    Returns: int64 (stop - start,).
    """
    stop = count if stop is None else stop
    assert 0 < count <= numel < 2**62, (name, count, numel)
    assert count < 2**31, f"{name}: {count} positions: i * (numel % count) would overflow"
    assert 0 <= start <= stop <= count, (start, stop, count)
    i = torch.arange(start, stop + 1, dtype=torch.int64, device=device)
    edges = _block_start(i, numel, count)
    return _in_block(i[:-1], edges[:-1], edges.diff(), stream_key(seed, name))


def strips(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    count: int,
    granularity: int,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """stratified-v1 over strips: `granularity` consecutive rows of one column, drawn anew in each block of rows.

    Args: shape: (..., rows, columns), of which `granularity` divides the rows; count: a multiple of `granularity`.
    Returns: int64 (stop - start,), sorted. A block of rows holds its positions as a (granularity, strips) matrix.
    """
    stop = count if stop is None else stop
    columns = shape[-1]
    grid, drawn = torch.Size(shape).numel() // granularity, count // granularity
    assert shape[-2] % granularity == 0, (name, shape, granularity)
    assert count == drawn * granularity, (name, count, granularity)
    assert (grid + 1) * drawn < 2**63, f"{name}: (grid + 1) * strips would overflow"

    key = stream_key(seed, name)

    def strip(i: torch.Tensor) -> torch.Tensor:
        i = i.clamp(max=drawn - 1)
        first = _block_start(i, grid, drawn)
        return _in_block(i, first, _block_start(i + 1, grid, drawn) - first, key)

    def strips_before(x: torch.Tensor) -> torch.Tensor:
        """How many strips lie before cell x of the grid: all that belong to earlier blocks, and perhaps its own."""
        i = ((x + 1) * drawn - 1) // grid
        return torch.where(x >= grid, drawn, i + (strip(i) < x))

    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    block = strip(index // granularity) // columns
    first = strips_before(block * columns)
    width = strips_before((block + 1) * columns) - first
    local = index - first * granularity
    row = block * granularity + local // width
    return row * columns + strip(first + local % width) % columns


def bernoulli_chunks(
    seed: int, name: str, numel: int, probability: float, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """bernoulli-v1: the positions whose hash falls below the probability, in order, some at a time.

    Yields: int64 (k,). At most a few MiB are held at once.
    """
    key = stream_key(seed, name, BERNOULLI)
    # Python compares the integer with the float exactly; 2**63 would not fit the signed comparison.
    below = min(round(probability * 2**63), 2**63 - 1)
    size = 8 * _chunk_size(device)
    for start in range(0, numel, size):
        i = torch.arange(start, min(start + size, numel), dtype=torch.int64, device=device)
        yield i[_hash(i, key) < below]


def by_magnitude(weight: torch.Tensor, count: int, smallest: bool = False, rows: tuple[int, ...] = ()) -> torch.Tensor:
    """The scalars of a weight with the largest (or smallest) absolute values; of equal ones those that come first.

    Args: rows: rows of a matrix that are selected whole; they are part of the count.
    Returns: int64 (count,), sorted, the same on every device.
    """
    magnitude = weight.detach().abs().float()
    if smallest:
        magnitude = -magnitude
    if rows:
        magnitude[list(rows)] = torch.inf
    magnitude = magnitude.flatten()
    edge = magnitude.topk(count, sorted=False).values.min()
    above = (magnitude > edge).nonzero().squeeze(1)
    ties = (magnitude == edge).nonzero().squeeze(1)[: count - above.numel()]
    return torch.cat([above, ties]).sort().values


def _cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _chunk_size(device: torch.device | str) -> int:
    return PIECE if torch.device(device).type == "cpu" else ACCELERATOR_CHUNK


def stream_key(seed: int, name: str, rule: str = STRATIFIED) -> int:
    """A signed 64-bit key for the draws of one parameter."""
    digest = hashlib.sha256(f"{rule}/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class Checksum:
    """A fingerprint of the bytes of tensors, one after the other. Of positions, it tells whether a rule still draws
    what it drew.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()

    def update(self, tensor: torch.Tensor) -> None:
        self._digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def checksum(tensor: torch.Tensor) -> str:
    """The Checksum of one tensor."""
    whole = Checksum()
    for chunk in tensor.flatten().split(1 << 18):
        whole.update(chunk)
    return whole.hexdigest()


def _block_start(i: torch.Tensor, numel: int, count: int) -> torch.Tensor:
    """floor(i * numel / count), without the 64-bit overflow of i * numel."""
    size, remainder = divmod(numel, count)
    # Truncation is several times faster than `//`, and the same here
    return torch.div(i * remainder, count, rounding_mode="trunc").add_(i, alpha=size)


def _in_block(i: torch.Tensor, first: torch.Tensor, size: torch.Tensor, key: int) -> torch.Tensor:
    """A position in each block: its first scalar and its size are given."""
    return _hash(i, key).remainder_(size).add_(first)


def _hash(counter: torch.Tensor, key: int) -> torch.Tensor:
    """SplitMix64's output number `counter` of the stream `key`, as a non-negative 63-bit integer."""
    x = (counter + 1).mul_(_GAMMA).add_(key)
    scratch = torch.empty_like(x)
    x.bitwise_xor_(_shift_right(x, 30, scratch)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27, scratch)).mul_(_MIX_2)
    x.bitwise_xor_(_shift_right(x, 31, scratch))
    return _shift_right(x, 1, x)


def _shift_right(x: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Logical shift: torch has no uint64 arithmetic, and >> on int64 copies the sign bit."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)
