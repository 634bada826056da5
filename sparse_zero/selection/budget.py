"""The number of trained scalars of each target parameter. Arithmetic on names and sizes, without tensors."""

import math
from collections.abc import Mapping, Sequence

from sparse_zero.errors import UserError


def counts_for_density(
    density: float,
    total: int,
    fully_trained: int,
    sizes: Mapping[str, int],
    granularity: Mapping[str, int] | None = None,
    setting: str | None = None,
    untargeted: Sequence[str] = (),
) -> dict[str, int]:
    """Distribute a budget of trainable scalars over the targets, in proportion to their sizes.

    Args:
        density: trainable fraction of the whole model, fully trained parameters included.
        total: number of scalars of the model.
        fully_trained: number of scalars that are trained anyway (the head, rows of tokens).
        sizes: number of scalars of each target, by parameter name.
        granularity: the number that each count must be a multiple of (rows of a strip), by parameter name; default 1.
        setting: the setting that determines the density, for error messages.
        untargeted: patterns of further targets that an error message suggests.

    Returns:
        A count for each target, at least one strip. Without strips the counts add up to the budget exactly. With
        strips they are rounded down to whole strips.

    Raises:
        UserError: the targets are too small, or the fully trained parameters exceed the budget.
    """
    setting = setting or f"density: {density:g}"
    granularity = {name: (granularity or {}).get(name, 1) for name in sizes}
    wanted = round(density * total) - fully_trained
    available = sum(sizes.values())
    if wanted > available:
        more = f" ({', '.join(untargeted)})" if untargeted else ""
        raise UserError(
            f"sparse.{setting} requires {wanted + fully_trained:,} of {total:,} scalars, but the targets and the "
            f"fully trained modules have only {available + fully_trained:,}: lower the density to at most "
            f"{_rounded_down(available + fully_trained, total):.4g}, or add targets{more}"
        )
    least_count = sum(granularity.values())
    if wanted < least_count:
        least = -_rounded_down(-fully_trained - least_count, total)
        raise UserError(
            f"sparse.{setting} allows {wanted + fully_trained:,} of {total:,} scalars. The fully trained modules need "
            f"{fully_trained:,}, which leaves too few for {len(sizes)} targets: raise the density to at least "
            f"{least:.4g}, or train fewer modules fully (modules_to_save)"
        )
    counts, seen, assigned = {}, 0, 0
    for name, size in sizes.items():
        seen += size
        # Cumulative rounding: the counts add up to `wanted` for any sizes.
        share = wanted * seen // available - assigned
        counts[name] = share - share % granularity[name]
        assigned += counts[name]
    # The count of a very small weight may round to 0, and ZeRO stage 3 fails on empty parameters.
    for name in [name for name, n in counts.items() if n == 0]:
        counts[name] = granularity[name]
        largest = max(counts, key=counts.__getitem__)
        if sum(counts.values()) > wanted and counts[largest] > granularity[largest]:
            counts[largest] -= granularity[largest]
    return counts


def counts_for_rank(
    rank: int, matrices: Mapping[str, tuple[int, int, int] | None], granularity: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The number of scalars of a LoRA adapter of this rank: rank * (rows + columns) for each matrix.

    Args:
        rank: the LoRA rank.
        matrices: (number of matrices, rows, columns) of each target, by parameter name; None for a vector.
        granularity: as in `counts_for_density`.

    Raises:
        UserError: a target is a vector, or has fewer scalars than that.
    """
    counts = {}
    for name, matrix in matrices.items():
        if matrix is None:
            raise UserError(
                f"sparse.rank_equivalent: {name} is a vector, and only matrices have a rank: "
                "set a density, or remove it from the targets (exclude_modules)"
            )
        number, rows, columns = matrix
        if rank * (rows + columns) > rows * columns:
            largest = rows * columns // (rows + columns)
            lower = f"lower it to at most {largest}, or " if largest else ""
            raise UserError(
                f"sparse.rank_equivalent: {rank} * ({rows:,} + {columns:,}) exceeds the {rows * columns:,} scalars of "
                f"{name}: {lower}remove it from the targets (exclude_modules)"
            )
        count, step = number * rank * (rows + columns), (granularity or {}).get(name, 1)
        counts[name] = max(count - count % step, step)
    return counts


def _rounded_down(part: int, total: int) -> float:
    """part / total, rounded down to four digits, so that the density that an error suggests is always possible."""
    digits = 3 - math.floor(math.log10(abs(part) / total))
    return part * 10**digits // total / 10**digits
