"""Which runs share_quality.py makes and in which order: pure functions of the results so far."""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import noise_quality_plan
from rpn_quality_plan import best

Row = dict[str, Any]

TASKS = ("rotten-tomatoes", "cola")
METRICS = {"rotten-tomatoes": "accuracy", "cola": "matthews"}
TIMES = {"rotten-tomatoes": 1, "cola": 4}
"""Training sentences of a task, in those of Rotten Tomatoes: CoLA's are short, and it takes more to learn anything."""

SEEDS = (0, 1, 2)
TUNING_SEED, SECOND_SEED = 100, 101
CLOSE = 0.02
"""Rates whose scores are nearer to the best one than this are tried with a second seed."""

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)
SCATTERED, LORA, FULL, HEAD = "scattered", "lora", "full", "head"
DRAWN = {"tenth": 0.1, "whole": "whole"}
"""`columns` of the methods that draw columns."""
METHODS = (SCATTERED, *DRAWN, LORA, FULL, HEAD)

LOW, MIDDLE, HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
RATES = {
    SCATTERED: {0.001: HIGH, 0.003: HIGH, 0.01: MIDDLE, 0.03: LOW, 0.1: LOW},
    LORA: {0.001: MIDDLE, 0.003: MIDDLE, 0.01: LOW, 0.03: LOW, 0.1: LOW},
    FULL: {1: (3e-5, 1e-4, 3e-4)},
    HEAD: {0: HIGH},
}
"""By method and share, around the rule of docs/choosing. Where the best is at the edge, the next one is tried too."""
LADDER, FURTHER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), 2
"""All rates, and how many may be tried beyond those of RATES."""


class Cell(NamedTuple):
    """What is tuned and tested: a method that trains a share of the model's scalars."""

    method: str
    share: float
    """1 for the whole model, 0 for its head."""

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES[SCATTERED if self.method in DRAWN else self.method][self.share]


CELLS = (
    Cell(FULL, 1),
    Cell(HEAD, 0),
    *(
        Cell(method, share)
        for share in (0.01, 0.001, 0.1, 0.003, 0.03)
        for method in (SCATTERED, LORA, *DRAWN)
        if (method, share) != ("tenth", 0.1)  # a tenth of the columns cannot hold them
    ),
)
"""The most worth first."""


class Scale(NamedTuple):
    """Each has its own learning rates."""

    size: int = 1000
    """Training sentences of Rotten Tomatoes."""
    epochs: int = 2


@dataclass(frozen=True)
class Run(noise_quality_plan.Run):
    """All settings that determine the result of a run."""

    task: str = TASKS[0]

    @property
    def key(self) -> str:
        return key_of(asdict(self))

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.density)


def key_of(row: Row) -> str:
    return json.dumps({name: row[name] for name in Run.__dataclass_fields__}, sort_keys=True)


def scales(done: dict[str, Row]) -> list[Scale]:
    """The scales that there are runs of, the largest first."""
    return sorted({Scale(row["size"] // TIMES[row["task"]], row["epochs"]) for row in done.values()}, reverse=True)


def _tuning_run(task: str, cell: Cell, scale: Scale, rate: float, seed: int) -> Run:
    size = scale.size * TIMES[task]
    return Run(cell.method, "none", None, rate, size, scale.epochs, seed, "validation", density=cell.share, task=task)


def rate_runs(task: str, cell: Cell, scale: Scale, done: dict[str, Row]) -> list[Run]:
    """The tuning runs of the first seed that are known so far, by rate."""

    def best_of(rates: list[float]) -> float | None:
        found = best([_tuning_run(task, cell, scale, rate, TUNING_SEED) for rate in rates], done)
        return found.learning_rate if found else None

    return [_tuning_run(task, cell, scale, rate, TUNING_SEED) for rate in with_neighbours(cell.rates, best_of)]


def with_neighbours(rates: Iterable[float], best_of: Callable[[list[float]], float | None]) -> list[float]:
    """The rates in ascending order, with up to FURTHER of LADDER beyond an edge that is the best.

    Args: best_of: the best one of these; None while a result is missing.
    """
    rates = list(rates)
    for _ in range(FURTHER):
        found = best_of(rates)
        if found == rates[-1] != LADDER[-1]:
            rates.append(LADDER[LADDER.index(found) + 1])
        elif found == rates[0] != LADDER[0]:
            rates.insert(0, LADDER[LADDER.index(found) - 1])
        else:
            break
    return rates


def deciding_runs(task: str, cell: Cell, scale: Scale, done: dict[str, Row]) -> list[Run]:
    """Those of the second seed, at the rates that are close to the best one; none if there is only that."""
    first = rate_runs(task, cell, scale, done)
    found = best(first, done)
    close = [run for run in first if found and done[found.key]["score"] - done[run.key]["score"] < CLOSE]
    return [replace(run, seed=SECOND_SEED) for run in close] if len(close) > 1 else []


def chosen_rate(task: str, cell: Cell, scale: Scale, done: dict[str, Row]) -> tuple[float, bool] | None:
    """The rate with the best score on validation sentences, and whether the cell was tuned itself: drawn columns have
    the rate of scattered scalars until then. None while one of the first three rates is missing; what is to be tried
    besides counts as soon as it is there.
    """
    for tuned in (cell, Cell(SCATTERED, cell.share)) if cell.method in DRAWN else (cell,):
        first = [run for run in rate_runs(task, tuned, scale, done) if run.key in done]
        second = deciding_runs(task, tuned, scale, done)
        if len(first) >= len(tuned.rates):
            are_both = bool(second) and all(run.key in done for run in second)
            found = max(second, key=lambda run: _scores_of_both(run, done)) if are_both else best(first, done)
            return found.learning_rate, tuned == cell
    return None


def _scores_of_both(run: Run, done: dict[str, Row]) -> tuple[float, float]:
    """The sums of score and negative loss over the tuning seeds."""
    rows = [done[key] for seed in (TUNING_SEED, SECOND_SEED) if (key := replace(run, seed=seed).key) in done]
    return sum(row["score"] for row in rows), -sum(row["loss"] for row in rows)


def tests(task: str, cell: Cell, scale: Scale, done: dict[str, Row]) -> list[Run]:
    """The runs on test sentences, seed by seed; none before the rate is chosen."""
    chosen = chosen_rate(task, cell, scale, done)
    if chosen is None:
        return []
    return [replace(_tuning_run(task, cell, scale, chosen[0], seed), split="test") for seed in SEEDS]


FULL_SCALE = Scale()


def plan(done: dict[str, Row], scale: Scale = FULL_SCALE, tasks: Collection[str] = TASKS) -> list[Run]:
    """All runs that are known so far, those in `done` included, the most worth first.

    Task after task and cell after cell is tuned and tested with the first seed; the other seeds follow, then the rates
    of drawn columns.
    """
    first: list[Run] = []
    further: list[Run] = []
    last: list[Run] = []
    for task in tasks:
        for cell in CELLS:
            tuning = [*rate_runs(task, cell, scale, done), *deciding_runs(task, cell, scale, done)]
            (last if cell.method in DRAWN else first).extend(tuning)
            tested = tests(task, cell, scale, done)
            first += tested[:1]
            further += tested[1:]
    further.sort(key=lambda run: run.seed)
    return [*first, *further, *last]
