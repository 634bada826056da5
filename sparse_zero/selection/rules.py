"""The rules that select scalars of a weight, and a selection by one of them. `draws` has the functions that draw.

Positions are int64 indices into the flattened (row-major) weight, strictly increasing. The rules draw the same
positions on every rank, on every device and in every later version, so positions are neither communicated nor stored.
The name of a rule contains a version. If a rule's result changes, the rule gets a new name.

A strip is `granularity` consecutive rows of one column. The strips of a weight of (..., rows, columns) form a grid of
(..., rows / granularity, columns), and a strip index is an index into this flattened grid. With granularity 1, strips
are single scalars and strip indices are positions.

stratified-v1: the weight is divided into n blocks whose sizes differ by at most one, and an integer hash selects one
    scalar of each block. The count is exact. The cost of a slice of the positions is proportional to its length. With
    a granularity above 1, strips are selected in the same way.
bernoulli-v1: each scalar is selected with probability p, independently (SpaRTA, arXiv 2502.15975). The count is
    random, and a slice requires all positions before it.
columns-v1: as stratified-v1, from some columns of the weight only (see `columns`). Strips are indices into the inner
    weight, which consists of these columns.
stored: positions that cannot be drawn again (the largest scalars of a pretrained weight, or positions given by the
    caller). Adapters store them.
"""

import functools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparse_zero.errors import UserError
from sparse_zero.selection import draws
from sparse_zero.selection.columns import COLUMNS, Columns
from sparse_zero.selection.draws import BERNOULLI, SHARED_CHUNK, STRATIFIED

STORED = "stored"

MAX_SCALARS = 2**62
"""Limit for the number of scalars of a weight, so that no sum of two positions overflows."""


@dataclass(frozen=True)
class Selection:
    """The selection of scalars in one weight. Equal selections have equal positions, unless these are stored.

    Raises:
        UserError: no weight of this shape has such a selection.
    """

    rule: str
    name: str
    shape: tuple[int, ...]
    count: int
    seed: int = 0
    probability: float | None = None
    """bernoulli-v1: the probability of each scalar."""
    granularity: int = 1
    """stratified-v1: the number of rows of a strip."""
    whole_rows: tuple[int, ...] = ()
    """Rows of a matrix that are selected in full (new tokens), sorted. The rule selects from the other rows."""
    columns: Columns | None = None
    """columns-v1: the columns that the scalars are drawn from."""

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise UserError(f"{self.name}: not a selection of a weight of shape {list(self.shape)}: {problem}")

    def _problem(self) -> str | None:
        shape, rows, g = self.shape, self.whole_rows, self.granularity
        if self.rule not in (STRATIFIED, BERNOULLI, COLUMNS, STORED):
            return f"no rule '{self.rule}'"
        if any(extent < 0 for extent in shape) or self.numel > MAX_SCALARS:
            return f"a weight has 0 to 2**{MAX_SCALARS.bit_length() - 1} scalars"
        if not 0 <= self.count <= self.numel:
            return f"{self.count} of {self.numel} scalars"
        if g < 1 or (g > 1 and (self.rule != STRATIFIED or rows or len(shape) < 2 or shape[-2] % g or self.count % g)):
            return f"granularity {g} for {self.count} scalars by rule {self.rule}"
        if rows and (len(shape) != 2 or rows[0] < 0 or rows[-1] >= shape[0] or any(a >= b for a, b in pairwise(rows))):
            return "its whole rows are not sorted rows of a matrix"
        if self.count < self.whole_row_scalars:
            return f"{self.count} scalars in {len(rows)} whole rows"
        by_rule = self.count - self.whole_row_scalars
        if self.rule == STRATIFIED and (by_rule >= 2**31 or (self.numel // g + 1) * (by_rule // g) >= 2**63):
            return f"{by_rule} scalars are more than the rule {self.rule} can draw from {self.numel}"
        if (self.rule == COLUMNS) != (self.columns is not None):
            return f"columns are given for the rule {COLUMNS}, and for no other"
        if self.columns is not None:
            return self._problem_of_columns(self.columns)
        if self.rule == BERNOULLI and not (self.probability is not None and 0 <= self.probability <= 1):
            return f"probability {self.probability}"
        return None

    def _problem_of_columns(self, columns: Columns) -> str | None:
        if len(self.shape) < 2 or self.whole_rows or not 0 < columns.count <= self.shape[columns.axis]:
            return f"{columns.count} columns of it"
        inner = math.prod(self.inner_shape)
        if self.count > inner:
            return f"{self.count} scalars in columns that have {inner}"
        if self.count >= 2**31 or (inner + 1) * self.count >= 2**63:
            return f"{self.count} scalars are more than the rule {self.rule} can draw from {inner}"
        return None

    @classmethod
    def bernoulli(
        cls, name: str, shape: tuple[int, ...], probability: float, seed: int, whole_rows: tuple[int, ...] = ()
    ) -> "Selection":
        """A bernoulli-v1 selection. Its count is found by drawing all positions once."""
        columns = shape[-1]
        numel = torch.Size(shape).numel() - len(whole_rows) * columns
        drawn = sum(chunk.numel() for chunk in draws.bernoulli_chunks(seed, name, numel, probability))
        return cls(BERNOULLI, name, shape, drawn + len(whole_rows) * columns, seed, probability, whole_rows=whole_rows)

    @property
    def numel(self) -> int:
        """The number of scalars of the weight."""
        return math.prod(self.shape)

    # Read for every layer of a step, hence kept

    @functools.cached_property
    def inner_shape(self) -> tuple[int, ...]:
        """The shape of the inner weight: of the drawn columns, or of the whole weight."""
        return self.columns.inner_shape(self.shape) if self.columns else self.shape

    @functools.cached_property
    def fills_columns(self) -> bool:
        """Whether every scalar of the drawn columns is selected."""
        return self.columns is not None and self.count == torch.Size(self.inner_shape).numel()

    @property
    def strip_count(self) -> int:
        """The number of selected strips: selected scalars / granularity."""
        return self.count // self.granularity

    @property
    def strip_dtype(self) -> torch.dtype:
        """The narrowest dtype for strip indices."""
        return torch.int32 if self.numel // self.granularity < 2**31 else torch.int64

    @property
    def can_regenerate(self) -> bool:
        """Whether the positions can be drawn again."""
        return self.rule != STORED

    @property
    def is_sliceable(self) -> bool:
        """Whether a slice of the positions can be drawn without the positions before it."""
        return self.rule in (STRATIFIED, COLUMNS) and not self.whole_rows

    @property
    def whole_row_scalars(self) -> int:
        """The number of positions in whole rows."""
        return len(self.whole_rows) * self.shape[-1] if self.whole_rows else 0

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """All positions: int64 (count,).

        Raises:
            ValueError: the rule is "stored".
            UserError: see `chunks`.
        """
        if self.rule == STORED:
            raise ValueError(f"{self.name}: stored positions cannot be drawn again")
        if self.whole_rows:
            return self._with_whole_rows(device)
        if self.rule == BERNOULLI:
            return torch.cat([*self.chunks(device)])
        flat = torch.empty(self.count, dtype=torch.int64, device=device)
        for start in range(0, self.count, SHARED_CHUNK):
            chunk = flat[start : start + SHARED_CHUNK]
            chunk.copy_(self.slice(start, start + chunk.numel(), device))
        return flat

    def strip_chunks(
        self, device: torch.device | str = "cpu", start: int = 0, stop: int | None = None
    ) -> Iterator[torch.Tensor]:
        """The strip indices of the selected strips [start, stop), in chunks.

        A selection that is not sliceable draws all strips before `stop`.

        Yields:
            int64 tensors; the indices are sorted.

        Raises:
            ValueError: the rule is "stored".
        """
        stop = self.strip_count if stop is None else stop
        if self.is_sliceable:
            for first, last in draws.ranges(start, stop, draws.chunk_size(device)):
                if self.columns:
                    yield self._inner(first, last, device)
                    continue
                grid = self.numel // self.granularity
                yield draws.stratified_positions(self.seed, self.name, grid, self.strip_count, first, last, device)
            return
        first = 0
        for chunk in self.chunks(device):
            if first >= stop:
                return
            yield chunk[max(0, start - first) : max(0, stop - first)]
            first += chunk.numel()

    def chunks(self, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
        """All positions in order, in chunks.

        Raises:
            ValueError: the rule is "stored".
            UserError: the probability selects another number of scalars. Raised before a chunk exceeds the number, or
                after the last chunk.
        """
        if self.whole_rows or self.rule == STORED:
            yield from draws.in_chunks(self.positions(device))
        elif self.rule == BERNOULLI:
            drawn = 0
            for chunk in draws.bernoulli_chunks(self.seed, self.name, self.numel, self.probability, device):
                drawn += chunk.numel()
                if drawn > self.count:
                    break
                yield chunk
            if drawn != self.count:
                more_or_less = "more" if drawn > self.count else "less"
                raise UserError(
                    f"{self.name}: its probability {self.probability} selects {more_or_less} than {self.count} scalars"
                )
        else:
            for start, stop in draws.ranges(0, self.count, draws.chunk_size(device)):
                yield self.slice(start, stop, device)

    def slice(self, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Positions [start, stop): int64 (stop - start,). The selection must be sliceable."""
        assert self.is_sliceable, self
        if self.columns:
            return self.positions_of(self._inner(start, stop, device), self.drawn_columns(device))
        if self.granularity > 1:
            return draws.stratified_strips(
                self.seed, self.name, self.shape, self.count, self.granularity, start, stop, device
            )
        return draws.stratified_positions(self.seed, self.name, self.numel, self.count, start, stop, device)

    def _inner(self, start: int, stop: int, device: torch.device | str) -> torch.Tensor:
        size = torch.Size(self.inner_shape).numel()
        return self.columns.inner_positions(self.seed, self.name, size, self.count, start, stop, device)

    def drawn_columns(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """columns-v1: the columns, int64 (K,)."""
        return self.columns.drawn(self.seed, self.shape[self.columns.axis], device)

    def positions_of(self, indices: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
        """The positions of strips of single scalars, int64.

        Args:
            indices: strip indices.
            drawn: `drawn_columns` if the rule is columns-v1, else None.
        """
        return self.columns.positions(indices, drawn, self.shape) if self.columns else indices.long()

    @functools.cached_property
    def columns_key(self) -> Hashable:
        """What the drawn columns are a function of: layers of an equal key that have the same input keep it once."""
        return self.seed, self.columns.group, self.shape[self.columns.axis], self.columns.count, self.fills_columns

    def _with_whole_rows(self, device: torch.device | str) -> torch.Tensor:
        """The positions in the whole rows, and those that the rule selects from the weight without these rows."""
        columns = self.shape[-1]
        rows = torch.tensor(self.whole_rows, device=device)
        if self.count == self.whole_row_scalars:
            return draws.row_positions(rows, columns)
        shape, count = (self.shape[0] - len(self.whole_rows), columns), self.count - self.whole_row_scalars
        flat = Selection(self.rule, self.name, shape, count, self.seed, self.probability).positions(device)
        # Row k of the smaller weight is the k-th row that is not a whole row.
        row = torch.div(flat, columns, rounding_mode="trunc")
        skipped = torch.searchsorted(rows - torch.arange(rows.numel(), device=device), row, right=True)
        return torch.cat([flat + skipped * columns, draws.row_positions(rows, columns)]).sort().values
