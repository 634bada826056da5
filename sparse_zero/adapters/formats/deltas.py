"""Arithmetic on positions and deltas: differences of weights, and padding to a number of deltas."""

import torch

from sparse_zero.selection import draws


def difference(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """new - old, computed in float32 or a wider dtype of one of them."""
    dtype = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    return new.to(dtype) - old.to(dtype)


def padded(
    name: str, flat: torch.Tensor, values: torch.Tensor, numel: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add positions with a delta of 0, spread over the weight, until there are `count`.

    Args:
        name: of the parameter, for the assertion.
        flat: int64 (n,), increasing.
        values: the deltas (n,).
        numel: number of scalars of the weight, at least `count`.
        count: at least n.

    Returns: increasing positions int64 (count,), and their deltas (count,).
    """
    missing = count - flat.numel()
    assert 0 <= missing <= numel - flat.numel(), (name, flat.numel(), numel, count)
    if missing == 0:
        return flat, values
    # At most n of these `count` distinct positions are among the given ones, so at least `missing` are left
    others = draws.stratified_positions(0, name, numel, count)
    others = others[~torch.isin(others, flat, assume_unique=True)]
    others = others[torch.arange(missing) * others.numel() // missing]
    every, order = torch.cat([flat, others]).sort()
    return every, torch.cat([values, values.new_zeros(missing)])[order]
