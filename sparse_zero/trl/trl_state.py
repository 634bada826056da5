"""What TRL's trainers count besides transformers' TrainerState. It is saved with each checkpoint."""

import json
from collections import defaultdict
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from sparse_zero.errors import UserError

Mode = Literal["train", "eval"]
Count = Literal["_total_train_tokens", "_step", "entropy_coef", "_last_world_entropy"]
"""Attributes of the trainers, of which each has some: the tokens that were trained on, micro-batches of GRPO, and the
state of its adaptive entropy."""


class _Saved(BaseModel):
    metrics: dict[Mode, dict[str, list[float | None]]]
    counts: dict[Count, int | float | None]


class TRLState(TrainerCallback, ExportableState):
    """Saves and restores the metrics since the last line of the log, and the counts. All ranks have the same."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"text": self.text}}

    @property
    def text(self) -> str:
        """JSON, whose structure depends on the steps that were taken."""
        trainer = self._trainer
        metrics = {mode: dict(trainer._metrics[mode]) for mode in get_args(Mode)}
        counts = {name: getattr(trainer, name) for name in get_args(Count) if hasattr(trainer, name)}
        return json.dumps({"metrics": metrics, "counts": counts}, default=float)

    @text.setter
    def text(self, text: str) -> None:
        trainer = self._trainer
        try:
            saved = _Saved.model_validate_json(text)
        except ValidationError:
            raise UserError("trainer_state.json: damaged: TRLState.text") from None
        for mode, metrics in saved.metrics.items():
            trainer._metrics[mode] = defaultdict(list, metrics)
        for name, count in saved.counts.items():
            if hasattr(trainer, name):
                setattr(trainer, name, count)
