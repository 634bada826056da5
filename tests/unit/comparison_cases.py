"""Comparisons of a recipe and stand-ins for their runs."""

from pathlib import Path

from launcher.comparison.runs import Ended
from launcher.comparison.variants import Comparison, Run, describe


def described(file: Path, *methods: str, rates: tuple[str, ...] = (), **changes) -> Comparison:
    given = {"overrides": [], "seeds": 2, "budget": None, "text": None, "out": str(file.parent / "out")} | changes
    return describe(str(file), methods=list(methods), rates=list(rates), **given)


def results(quality: float, rate: float = 1e-3, **more) -> dict:
    """What a run writes, with as much accuracy on the validation examples as on the test examples."""
    metrics = {"accuracy": quality, "loss": 1 - quality}
    known = {"method": "sparse", "eval_examples": 10, "test_examples": 100, "train_examples": 20, "world_size": 1}
    known |= {"trainable_parameters": 5, "train_seconds": 2.0, "tokens_per_second": 50.0, "checkpoint_bytes": 60}
    known |= {"peak_memory_bytes_per_rank": [2**20], "optimizer_bytes_per_rank": [40], "adapter_bytes": 20}
    return metrics | known | {"test": metrics, "zero_stage": 0, "device": "a CPU"} | more


class Fake:
    """Stands for the execution of runs: gives the quality of (variant, rate, seed)."""

    def __init__(self, quality) -> None:
        self.quality, self.runs = quality, []

    def __call__(self, comparison: Comparison, run: Run) -> Ended:
        self.runs.append((run.variant, run.rate, run.seed))
        found = self.quality(run)
        return Ended(run, None, found) if isinstance(found, str) else Ended(run, results(found))
