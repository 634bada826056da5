"""Finds trained values that are NaN or infinite, so that a diverged training is seen before its result is used."""

from collections.abc import Iterable

import torch


def count_not_finite(values: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Count values that are NaN or infinite.

    Args:
        values: names and tensors; a name may occur more than once. Each tensor is read when it is yielded.

    Returns: the counts by name, without zeros.
    """
    counts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in values:
        counts.setdefault(name, []).append((~torch.isfinite(tensor.detach())).sum())
    # At the end: each conversion waits for the accelerator
    totals = {name: sum(int(count) for count in found) for name, found in counts.items()}
    return {name: total for name, total in totals.items() if total}


def describe(counts: dict[str, int]) -> str:
    """The first name with its count, and the number of others: `layer.weight (3 values) and 2 more parameters`."""
    name, count = next(iter(counts.items()))
    more = len(counts) - 1
    others = f" and {more} more parameter{'s'[: more > 1]}" if more else ""
    return f"{name} ({count:,} value{'s'[: count > 1]}){others}"
