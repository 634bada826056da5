"""Which runs gsm8k_share.py makes and in which order: pure functions of the results so far."""

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from share_quality_plan import CELLS, DRAWN, FULL, HEAD, LORA, SCATTERED, Cell, with_neighbours

Row = dict[str, Any]

SEEDS = (0, 1, 2)

LOWEST, LOW, MIDDLE, HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 0.1)
RATES = {
    SCATTERED: {0.001: HIGH, 0.003: MIDDLE, 0.01: MIDDLE, 0.03: LOW, 0.1: LOWEST},
    LORA: {0.001: MIDDLE, 0.003: LOW, 0.01: LOW, 0.03: LOW, 0.1: LOWEST},
    FULL: {1: (1e-4, 3e-4, 1e-3)},
    HEAD: {0: (1e-4, 3e-4, 1e-3)},
}
"""By method and share, around the best of the first runs at 1%. Beyond an edge that is best the next is tried too."""


class Scale(NamedTuple):
    """Each has its own learning rates."""

    problems: int = 0
    """To train on; 0: all that are not held out."""
    longest: int = 320
    """Longer ones are left out. Tokens of question and answer."""
    batch: int = 32
    held_out: int = 1000
    """Of the end of train.jsonl to validate on, and of the start of test.jsonl to test on."""


FULL_SCALE = Scale()


@dataclass(frozen=True)
class Run:
    """All settings that determine the result of a run."""

    method: str
    density: float
    """As `Cell.share`."""
    learning_rate: float
    seed: int
    problems: int
    longest: int
    batch: int
    held_out: int

    @classmethod
    def of(cls, row: Row) -> "Run":
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def scale(self) -> Scale:
        return Scale(self.problems, self.longest, self.batch, self.held_out)


def key_of(row: Row) -> str:
    return Run.of(row).key


def scales(done: dict[str, Row]) -> list[Scale]:
    """The scales that there are runs of, the largest first."""
    found = {Run.of(row).scale for row in done.values()}
    return sorted(found, key=lambda scale: (scale.problems == 0, scale), reverse=True)


def rates_of(cell: Cell) -> tuple[float, ...]:
    return RATES[SCATTERED if cell.method in DRAWN else cell.method][cell.share]


def run_of(cell: Cell, scale: Scale, rate: float, seed: int = SEEDS[0]) -> Run:
    return Run(cell.method, cell.share, rate, seed, *scale)


def _best(cell: Cell, scale: Scale, rates: list[float], done: dict[str, Row]) -> float | None:
    """The rate with the lowest loss on validation problems; None if no run is there."""
    losses = {rate: done[key]["validation"] for rate in rates if (key := run_of(cell, scale, rate).key) in done}
    return min(losses, key=losses.get) if losses else None


def rate_runs(cell: Cell, scale: Scale, done: dict[str, Row]) -> list[Run]:
    """The runs of the first seed that are known so far, by rate."""

    def best(rates: list[float]) -> float | None:
        are_there = all(run_of(cell, scale, rate).key in done for rate in rates)
        return _best(cell, scale, rates, done) if are_there else None

    return [run_of(cell, scale, rate) for rate in with_neighbours(rates_of(cell), best)]


def chosen_rate(cell: Cell, scale: Scale, done: dict[str, Row]) -> float | None:
    """None while one of the first three rates is missing; what is tried besides counts as soon as it is there."""
    if any(run_of(cell, scale, rate).key not in done for rate in rates_of(cell)):
        return None
    return _best(cell, scale, [run.learning_rate for run in rate_runs(cell, scale, done)], done)


def tests(cell: Cell, scale: Scale, done: dict[str, Row]) -> list[Run]:
    """The runs at the chosen rate, seed by seed; none before it is chosen."""
    rate = chosen_rate(cell, scale, done)
    return [] if rate is None else [run_of(cell, scale, rate, seed) for seed in SEEDS]


FIRST = 6
"""The first of CELLS, full fine-tuning, the head and 1%, have all rates and seeds before the others have any."""


def plan(done: dict[str, Row], scale: Scale = FULL_SCALE) -> list[Run]:
    """All runs that are known so far, those in `done` included, the most worth first: of 1% and then of the other
    shares the middle rate of every cell, then its other rates, then the other seeds.
    """
    runs: list[Run] = []
    for cells in (CELLS[:FIRST], CELLS[FIRST:]):
        tuning = [run for cell in cells for run in rate_runs(cell, scale, done)]
        tuning.sort(key=lambda run: run.learning_rate != rates_of(Cell(run.method, run.density))[1])
        further = [run for cell in cells for run in tests(cell, scale, done)[1:]]
        runs += [*tuning, *sorted(further, key=lambda run: run.seed)]
    return runs
