"""What an evaluation reports: scores of a classifier, the exact loss per token of a language model."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, accuracy, F1 and Matthews correlation of logits [examples, classes] against labels [examples].

    The loss is the mean over all examples, in nats; the Trainer's own is a mean of batch means, in which the examples
    that fill up the last batch of a rank count twice.

    F1 is that of class 1 where there are two classes, else the mean over the classes that occur.
    """
    logits = _first(prediction.predictions)
    predicted, labels = logits.argmax(-1), prediction.label_ids
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "example_loss": F.cross_entropy(torch.as_tensor(logits).float(), torch.as_tensor(labels)).item(),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


@torch.no_grad()
def token_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats and number of predicted tokens of each example: float32 [batch, 2].

    Takes a causal model's logits [batch, tokens, vocabulary] and the labels [batch, tokens] of the same positions
    (the shift by one happens here; -100 is not counted). Given to the Trainer as `preprocess_logits_for_metrics`, it
    gathers two numbers per example instead of its logits, and duplicates that fill the last batch of a rank are
    dropped before they are summed. The loss that the Trainer reports is a mean of batch means.
    """
    # One example at a time: a float32 copy of a whole batch of logits is often the largest tensor of an evaluation.
    return torch.stack([_token_loss(*example) for example in zip(_first(logits), labels, strict=True)])


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    targets = labels[1:]
    loss = F.cross_entropy(logits[:-1].float(), targets, ignore_index=-100, reduction="sum")
    return torch.stack([loss, (targets != -100).sum().to(loss.dtype)])


def language_model_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss per token in nats, and its exponential, from the output of `token_losses` [examples, 2]."""
    loss, tokens = _first(prediction.predictions).astype(np.float64).sum(axis=0)
    token_loss = loss / tokens
    with np.errstate(over="ignore"):
        return {"token_loss": float(token_loss), "perplexity": float(np.exp(token_loss))}


def _first(outputs):
    """The logits alone, where the model returns more (hidden states, router logits, a cache)."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
