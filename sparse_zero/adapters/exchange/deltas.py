"""Arithmetic on positions and deltas: those of two weights, and more of them for formats that fix their number."""

import torch

from sparse_zero.selection import rules


def difference(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What leads from `old` to `new` when it is added, to within its own rounding. Returns: at least float32."""
    dtype = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    return new.to(dtype) - old.to(dtype)


def padded(
    name: str, flat: torch.Tensor, values: torch.Tensor, numel: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` positions with their deltas, in increasing order: those given, and others spread over the weight with 0,
    which change nothing.

    Args: flat: int64 (n,), increasing; values: (n,); numel: scalars of the weight, at least `count`, at least n.
    Returns: int64 (count,), (count,).
    """
    missing = count - flat.numel()
    assert 0 <= missing <= numel - flat.numel(), (name, flat.numel(), numel, count)
    if missing == 0:
        return flat, values
    # Of n + missing distinct positions, at most n are taken.
    others = rules.stratified_positions(0, name, numel, count)
    others = others[~torch.isin(others, flat, assume_unique=True)]
    others = others[torch.arange(missing) * others.numel() // missing]
    every, order = torch.cat([flat, others]).sort()
    return every, torch.cat([values, values.new_zeros(missing)])[order]
