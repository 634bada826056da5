"""The learning rate of a run whose recipe has none. Imports no torch."""

import math

from sparse_zero.selection.config import DEFAULT_DENSITY

MEASURED = {"causal-lm": ((0.01, 1e-2), (1.0, 3e-4)), "sequence-classification": ((0.02, 3e-3), (1.0, 1e-4))}
"""For each task the best of the measured rates at two shares of trained scalars. docs/choosing has the tables."""


OTHER_METHODS = {
    "causal-lm": {"lora": 1e-2, "dora": 1e-2, "full": 3e-4, "head": 3e-4},
    "sequence-classification": {"lora": 1e-3, "dora": 1e-3, "full": 1e-4, "head": 3e-2},
}
"""For each task the rates of the other methods. Those of LoRA and full fine-tuning are the best of the measured ones;
that of a classifier's head is in the range that was best in benchmarks/share_quality.py, where 3e-3 learnt nothing.
Those of DoRA and of a language model's head are LoRA's and full fine-tuning's, without a measurement."""


OF_SFT = {"dpo": 1 / 20, "grpo": 1 / 20, "rloo": 1 / 20}
"""By objective, the part of the rate of supervised fine-tuning: the ratio of TRL's own defaults, 1e-6 and 2e-5."""


def default_learning_rate(task: str, density: float | None, objective: str | None = None) -> float:
    """The learning rate for a task, an objective and the share of the model's scalars that are trained.

    The best rate falls with the share. Between the two measured shares it is a power of the share; below the smaller
    one it stays.

    Args:
        task: the recipe's `model.task`.
        density: the trained share of the model; None: 1%.
        objective: as in a recipe, `training.objective`.

    Returns: the rate, rounded to one significant digit.
    """
    (share, rate), (whole, rate_of_whole) = MEASURED[task]
    share_here = max(DEFAULT_DENSITY if density is None else density, share)
    power = math.log(rate_of_whole / rate) / math.log(whole / share)
    return float(f"{rate * (share_here / share) ** power * OF_SFT.get(objective or '', 1):.0e}")
