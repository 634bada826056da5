"""Drawing positions: pure functions of (seed, parameter name, shape, count). rules.py describes the rules.

Positions are int64 indices into the flattened weight, strictly increasing, and the same on every device.
"""

from collections.abc import Iterator

import torch

from sparse_zero.selection.hashes import block_start, hashed, in_block, stratified_draw, stream_key

STRATIFIED, BERNOULLI = "stratified-v1", "bernoulli-v1"

CPU_CHUNK = 32_000
"""Number of positions in a chunk on a CPU: torch divides operations on more than 32,768 among its threads."""

SHARED_CHUNK = 1 << 16
"""Number of positions in a chunk that torch's threads compute together, small enough for the CPU's cache."""
ACCELERATOR_CHUNK = 1 << 20
"""Number of positions in a chunk on an accelerator."""


def row_positions(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """All positions in some rows of a matrix: int64 (rows * columns,)."""
    return (rows[:, None] * columns + torch.arange(columns, device=rows.device)).flatten()


def stratified_positions(
    seed: int,
    name: str,
    numel: int,
    count: int,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """stratified-v1 with granularity 1: positions [start, stop) of the selected scalars of a weight.

    Args:
        seed: the seed of the selection.
        name: the name of the parameter.
        numel: number of scalars of the weight.
        count: number of selected scalars.
        start, stop: the slice to draw; by default all positions.

    Returns:
        int64 (stop - start,).
    """
    stop = count if stop is None else stop
    return stratified_draw(stream_key(seed, name, STRATIFIED), numel, count, start, stop, device)


def stratified_strips(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    count: int,
    granularity: int,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """stratified-v1 with strips: positions [start, stop) of the selected scalars of a weight.

    Args:
        seed: the seed of the selection.
        name: the name of the parameter.
        shape: (..., rows, columns) of the weight; `granularity` divides the number of rows.
        count: number of selected scalars, a multiple of `granularity`.
        granularity: number of rows of a strip.
        start, stop: the slice to draw; by default all positions.

    Returns:
        int64 (stop - start,), sorted. The positions in a block of `granularity` rows form a (granularity, strips)
        matrix, row by row.
    """
    stop = count if stop is None else stop
    columns = shape[-1]
    grid, drawn = torch.Size(shape).numel() // granularity, count // granularity
    assert shape[-2] % granularity == 0, (name, shape, granularity)
    assert count == drawn * granularity, (name, count, granularity)
    assert (grid + 1) * drawn < 2**63, f"{name}: (grid + 1) * strips would overflow"

    key = stream_key(seed, name, STRATIFIED)

    def strip(i: torch.Tensor) -> torch.Tensor:
        i = i.clamp(max=drawn - 1)
        first = block_start(i, grid, drawn)
        return in_block(i, first, block_start(i + 1, grid, drawn) - first, key)

    def strips_before(x: torch.Tensor) -> torch.Tensor:
        """The number of selected strips before index x of the grid: those of earlier blocks, and perhaps one more."""
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
    """bernoulli-v1: the positions whose hash is below the probability, in order, in chunks.

    Yields:
        int64 tensors. At most a few MiB are allocated at a time.
    """
    key = stream_key(seed, name, BERNOULLI)
    # The comparison below is signed, so 2**63 is out of range.
    below = min(round(probability * 2**63), 2**63 - 1)
    size = 8 * chunk_size(device)
    for start in range(0, numel, size):
        i = torch.arange(start, min(start + size, numel), dtype=torch.int64, device=device)
        yield i[hashed(i, key) < below]


def by_magnitude(weight: torch.Tensor, count: int, smallest: bool = False, rows: tuple[int, ...] = ()) -> torch.Tensor:
    """The positions of the scalars with the largest (or smallest) absolute values; of equal ones the first.

    Args:
        weight: the pretrained weight.
        count: number of positions, including those in `rows`.
        smallest: select the smallest absolute values.
        rows: rows of a matrix that are selected in full.

    Returns:
        int64 (count,), sorted, the same on every device.
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


def in_chunks(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split available positions into chunks, like those of `rules.Selection.chunks`."""
    return iter(flat.split(chunk_size(flat.device)))


def ranges(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The range [start, stop) in pieces of at most `size`."""
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def chunk_size(device: torch.device | str) -> int:
    """The number of positions in a chunk on a device."""
    return CPU_CHUNK if torch.device(device).type == "cpu" else ACCELERATOR_CHUNK
