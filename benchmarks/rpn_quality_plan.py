"""Which runs rpn_quality.py makes and in which order: pure functions of the results so far."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from tweeteval import TASKS

Row = dict[str, Any]

METHODS = ("full", "sparse")
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
RATES = {"full": (5e-5, 1e-4, 3e-4), "sparse": (1e-3, 3e-3, 1e-2)}

CORE = ("none", "rpn", "none, twice the epochs")
RIVALS = ("gaussian", "salt-and-pepper", "neftune", "symnoise", "freelb", "eda", "aeda")
FAULTS = ("rpn, mask per epoch", "rpn, padding moved", "rpn, one order")
SELECTIONS = ("magnitude", "gradient", "snip")
"""Instead of scalars drawn at random; of sparse runs without noise. Each has its own learning rate."""

NAMES = (*CORE, *RIVALS, *FAULTS, *SELECTIONS)
STRENGTHS = {
    "rpn": ("probability", (0.1, 0.3)),
    "gaussian": ("std", (0.02, 0.05)),
    "salt-and-pepper": ("probability", (0.05, 0.2)),
    "neftune": ("alpha", (5.0, 15.0)),
    "symnoise": ("alpha", (5.0, 15.0)),
    "freelb": ("ascent_step", (0.1, 0.3)),
}
TUNED_ON = "irony"
"""The task on whose validation tweets the strengths are chosen, for each method."""


@dataclass(frozen=True)
class Run:
    """All settings that determine the result of a run."""

    task: str
    method: str
    name: str
    strength: float | None
    learning_rate: float
    seed: int
    split: Literal["validation", "test"]
    size: int = 2000
    epochs: int = 2
    batch_size: int = 16
    warmup: float = 0.06
    density: float = 0.02
    max_length: int = 64
    held_out: int = 2000
    """Tweets of the validation or test part that are used, at most."""
    precision: str = "bfloat16"

    @property
    def key(self) -> str:
        return key_of(asdict(self))


def key_of(row: Row) -> str:
    return json.dumps({name: row[name] for name in Run.__dataclass_fields__}, sort_keys=True)


class Scale(NamedTuple):
    """A smaller experiment of the same plan, for a slow machine. It has its own learning rates and strengths."""

    size: int = Run.size
    epochs: int = Run.epochs
    """Of `none`."""

    def run(self, planned: Run) -> Run:
        """The run of this scale for one of the plan."""
        return replace(planned, size=self.size, epochs=planned.epochs // Run.epochs * self.epochs)

    def results(self, done: dict[str, Row]) -> dict[str, Row]:
        """The results of this scale, by the keys of the plan's runs."""
        own = [row for row in done.values() if row["size"] == self.size and row["epochs"] % self.epochs == 0]
        planned = [row | {"size": Run.size, "epochs": row["epochs"] // self.epochs * Run.epochs} for row in own]
        return {key_of(row): row for row in planned}


def scales(done: dict[str, Row]) -> list[Scale]:
    """The scales that there are runs of, the largest first."""
    sizes = sorted({row["size"] for row in done.values()}, reverse=True)
    return [Scale(size, min(row["epochs"] for row in done.values() if row["size"] == size)) for size in sizes]


def rate_runs(task: str, method: str, name: str = "none") -> list[Run]:
    return [Run(task, method, name, None, rate, TUNING_SEED, "validation") for rate in RATES[method]]


def strength_runs(method: str, name: str, rate: float) -> list[Run]:
    return [Run(TUNED_ON, method, name, value, rate, TUNING_SEED, "validation") for value in STRENGTHS[name][1]]


def best(runs: list[Run], done: dict[str, Row]) -> Run | None:
    """The run with the highest score on the validation part (then the lowest loss); None while one is missing."""
    if any(run.key not in done for run in runs):
        return None
    return max(runs, key=lambda run: (done[run.key]["score"], -done[run.key]["loss"]))


def noise_of(name: str) -> str:
    """The noise that a variant has: that of its faulty kind too."""
    return name.partition(",")[0] if name in (*RIVALS, *FAULTS, "rpn") else "none"


def plan(
    done: dict[str, Row],
    tasks: Collection[str] = TASKS,
    methods: Collection[str] = METHODS,
    names: Collection[str] = NAMES,
) -> list[Run]:
    """All runs that are known so far, those in `done` included, the most worth first.

    The learning rate of each task and method is chosen without noise, then the strengths on one task; the tests follow
    seed by seed, in each seed RPN and its controls first, then the rivals, then the faults and the selections.
    """
    tuning, tests = [], []
    for method in methods:
        first = rate_runs(TUNED_ON, method)
        rate_of_tuned = best(first, done)
        for name in [name for name in STRENGTHS if name in {noise_of(each) for each in names}]:
            if rate_of_tuned is None:
                tuning += first
            else:
                tuning += strength_runs(method, name, rate_of_tuned.learning_rate)
        for task in tasks:
            tuning += rate_runs(task, method)
            if method == "sparse":
                for name in [name for name in SELECTIONS if name in names]:
                    tuning += rate_runs(task, method, name)
                    if own := best(rate_runs(task, method, name), done):
                        tests += [replace(own, seed=seed, split="test") for seed in SEEDS]
            if chosen := best(rate_runs(task, method), done):
                tests += _tests(chosen, names, done, rate_of_tuned)
    order = {name: 0 if name in CORE else 1 if name in RIVALS else 2 for name in NAMES}
    tests.sort(key=lambda r: (r.seed, order[r.name], TASKS.index(r.task), METHODS.index(r.method)))
    # What decides the tests of the core comes before the strengths of the rivals
    tuning.sort(key=lambda r: (order[r.name], TASKS.index(r.task)))
    runs = [r for r in tuning if order[r.name] == 0] + [r for r in tests if order[r.name] == 0 and r.seed == SEEDS[0]]
    return [*dict.fromkeys([*runs, *tuning, *tests])]


def _tests(chosen: Run, names: Collection[str], done: dict[str, Row], rate_of_tuned: Run | None) -> list[Run]:
    runs = []
    for name in [name for name in NAMES if name in names]:
        if name in SELECTIONS:
            continue
        strength, noise = None, noise_of(name)
        if noise in STRENGTHS:
            tuned = rate_of_tuned and best(strength_runs(chosen.method, noise, rate_of_tuned.learning_rate), done)
            if not tuned:
                continue
            strength = tuned.strength
        epochs = 2 * chosen.epochs if name == "none, twice the epochs" else chosen.epochs
        runs += [replace(chosen, name=name, strength=strength, seed=s, split="test", epochs=epochs) for s in SEEDS]
    return runs
