"""How many scalars of each target train: arithmetic on names and sizes, no tensors."""

import math
from collections.abc import Mapping, Sequence

from sparse_zero.errors import UserError


def by_density(
    density: float,
    total: int,
    fully_trained: int,
    sizes: Mapping[str, int],
    granularity: Mapping[str, int] | None = None,
    asked: str | None = None,
    untargeted: Sequence[str] = (),
) -> dict[str, int]:
    """Counts with which all trainable scalars together are `density` of the model.

    Args: total: scalars of the model; fully_trained: of them, those trained whole (the head, rows of tokens);
        sizes: scalars of each target, by parameter name; granularity: what each count is a multiple of, 1 where it
        is not said; asked: the setting that asked for this density; untargeted: patterns that an error may advise.
    Returns: a count for each target, at least one strip, in proportion to its size. They add up exactly, but for what
        strips leave over.
    Raises UserError where the targets are too small, or what is trained whole is over the budget.
    """
    asked = asked or f"density: {density:g}"
    granularity = {name: (granularity or {}).get(name, 1) for name in sizes}
    wanted = round(density * total) - fully_trained
    available = sum(sizes.values())
    if wanted > available:
        more = f" ({', '.join(untargeted)})" if untargeted else ""
        raise UserError(
            f"sparse.{asked} asks for {wanted + fully_trained:,} of {total:,} scalars, but the targets and the fully "
            f"trained modules have {available + fully_trained:,}: lower the density to at most "
            f"{_rounded_down(available + fully_trained, total):.4g}, or add targets{more}"
        )
    least_count = sum(granularity.values())
    if wanted < least_count:
        least = -_rounded_down(-fully_trained - least_count, total)
        raise UserError(
            f"sparse.{asked} asks for {wanted + fully_trained:,} of {total:,} scalars, of which the fully trained "
            f"modules take {fully_trained:,}, too few for {len(sizes)} targets: raise the density to at least "
            f"{least:.4g}, or train less of the model whole (modules_to_save)"
        )
    counts, seen, taken = {}, 0, 0
    for name, size in sizes.items():
        seen += size
        # Cumulative rounding: the counts add up to `wanted` whatever the sizes.
        share = wanted * seen // available - taken
        counts[name] = share - share % granularity[name]
        taken += counts[name]
    # A tiny weight beside a huge one rounds to nothing; a length of 0 would break ZeRO-3.
    for name in [name for name, n in counts.items() if n == 0]:
        counts[name] = granularity[name]
        largest = max(counts, key=counts.__getitem__)
        if sum(counts.values()) > wanted and counts[largest] > granularity[largest]:
            counts[largest] -= granularity[largest]
    return counts


def by_rank(
    rank: int, matrices: Mapping[str, tuple[int, int, int] | None], granularity: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The number of scalars of a LoRA adapter of this rank: rank * (rows + columns) for each matrix.

    Args: matrices: (matrices, rows, columns) of each target, None of a vector; granularity: as in `by_density`.
    Raises UserError where a target is a vector, or smaller than that.
    """
    counts = {}
    for name, matrix in matrices.items():
        if matrix is None:
            raise UserError(
                f"sparse.rank_equivalent: {name} is a vector, and only matrices have a rank: "
                "set a density, or leave it out of the targets"
            )
        number, rows, columns = matrix
        if rank * (rows + columns) > rows * columns:
            largest = rows * columns // (rows + columns)
            lower = f"lower it to at most {largest}, or " if largest else ""
            raise UserError(
                f"sparse.rank_equivalent: {rank} * ({rows:,} + {columns:,}) is more than {name} has, "
                f"{rows * columns:,}: {lower}leave it out (exclude_modules)"
            )
        count, step = number * rank * (rows + columns), (granularity or {}).get(name, 1)
        counts[name] = max(count - count % step, step)
    return counts


def _rounded_down(part: int, total: int) -> float:
    """part / total in four digits, never above it: a density that an error advises must be possible itself."""
    digits = 3 - math.floor(math.log10(abs(part) / total))
    return part * 10**digits // total / 10**digits
