"""Examples that cannot be used: each has a reason, and the reasons are counted and reported."""

import logging
from collections import defaultdict

import pyarrow.compute as pc
from datasets import Dataset

from sparse_zero.data.cached_maps import filter_rows
from sparse_zero.errors import UserError

logger = logging.getLogger(__name__)


class Dropped:
    """The reasons why examples were dropped, with their counts, by split."""

    def __init__(self, is_reported: bool = True) -> None:
        """Args: is_reported: whether to log warnings."""
        self.counts: dict[str, dict[str, int]] = defaultdict(dict)
        self.is_reported = is_reported

    def incomplete(self, dataset: Dataset, columns: list[str], split: str) -> Dataset:
        """Leave out the rows that lack a value of a column.

        Args: split: the split's name, for messages.

        Raises UserError: no row is left.
        """
        if not any(dataset.data.column(column).null_count for column in columns):
            return dataset
        kept = filter_rows(dataset, _is_present, columns)
        self._count(len(dataset), {f"have no value for {' or '.join(columns)}": len(dataset) - len(kept)}, split)
        return kept

    def with_reason(self, encoded: Dataset, split: str) -> Dataset:
        """Leave out the examples whose column `dropped` has a reason, and remove the column.

        Raises UserError: no example is left.
        """
        counts = pc.value_counts(encoded.data.column("dropped")).to_pylist()
        reasons = {count["values"]: count["counts"] for count in counts if count["values"]}
        self._count(len(encoded), reasons, split)
        kept = filter_rows(encoded, _has_no_reason, ["dropped"]) if reasons else encoded
        return kept.remove_columns("dropped")

    def _count(self, total: int, reasons: dict[str, int], split: str) -> None:
        reasons = {reason: count for reason, count in reasons.items() if count}
        if reasons and sum(reasons.values()) == total:
            each = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
            raise UserError(
                f"no {split} example is left: all {total} {each if len(reasons) > 1 else next(iter(reasons))}"
            )
        for reason, count in reasons.items():
            self.counts[split][reason] = count
            if self.is_reported:
                logger.warning("dropped %d of %d %s examples: they %s", count, total, split, reason)


def _is_present(*columns: list) -> list[bool]:
    return [None not in row for row in zip(*columns, strict=True)]


def _has_no_reason(dropped: list[str]) -> list[bool]:
    return [not reason for reason in dropped]
