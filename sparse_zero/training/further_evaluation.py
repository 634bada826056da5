"""Evaluations besides that of the evaluation examples: on test examples, and on a text, for what was forgotten.

The trained model is evaluated on the test examples once, at the end. The loss on the text is also measured before
training; a checkpoint keeps it, in the log.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

TEST, TEXT = "test", "text"
_TEXT_LOSS = f"{TEXT}_token_loss"


@dataclass(frozen=True)
class FurtherData:
    """Examples, each None if the recipe asks for none."""

    test: Dataset | None = None
    text: Dataset | None = None
    text_name: str | None = None
    """The recipe's `data.forgetting`."""


class LossBeforeTraining(TrainerCallback):
    """Measures the loss on the text before the first step."""

    def __init__(self, trainer: Trainer, text: Dataset) -> None:
        self._trainer, self._text = trainer, text

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._trainer.evaluate(self._text, metric_key_prefix=TEXT)


def further_results(trainer: Any, data: FurtherData) -> dict[str, Any]:
    """Evaluate a trained model on the further data. A collective call.

    Args: trainer: a SparseTrainer.

    Returns: `test`: its metrics, and `test_examples`; `forgetting`: the loss on the text before and after training in
        nats per token, the difference `change`, and the number of tokens.
    """
    results: dict[str, Any] = {}
    if data.test is not None:
        metrics = trainer.evaluate(data.test, metric_key_prefix=TEST)
        as_evaluation = {f"eval_{key.removeprefix(f'{TEST}_')}": value for key, value in metrics.items()}
        results |= {"test": trainer.evaluation_results(as_evaluation), "test_examples": len(data.test)}
    if data.text is not None:
        after = trainer.evaluate(data.text, metric_key_prefix=TEXT)[_TEXT_LOSS]
        before = next(entry[_TEXT_LOSS] for entry in trainer.state.log_history if _TEXT_LOSS in entry)
        tokens = sum(len(piece) for piece in data.text["input_ids"])
        results["forgetting"] = {
            "text": data.text_name,
            "tokens": tokens,
            "loss_before": before,
            "loss": after,
            "change": after - before,
        }
    return results
