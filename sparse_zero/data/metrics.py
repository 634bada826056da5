"""Metrics of an evaluation: scores of classes or numbers, and the exact loss per token of a language model.

scikit-learn and SciPy are imported where they are needed: a language model starts sooner without them.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from sparse_zero.recipe.recipe import ProblemType


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, accuracy, F1 and Matthews correlation of a classifier.

    Args:
        prediction: logits (examples, classes) and labels (examples,).

    Returns:
        `example_loss`: the mean over all examples, in nats. The Trainer's own loss is a mean of batch means, in which
            examples that pad the last batch of a rank count twice.
        `accuracy`.
        `f1`: of class 1 for two classes, otherwise the mean over the classes that occur.
        `matthews_correlation`.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = _first(prediction.predictions)
    predicted, labels = logits.argmax(-1), prediction.label_ids
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "example_loss": F.cross_entropy(torch.as_tensor(logits).float(), torch.as_tensor(labels)).item(),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, F1 and accuracy of a classifier that gives each text any number of classes.

    A class is predicted where its logit is positive, a probability above one half.

    Args:
        prediction: logits (examples, classes) and labels (examples, classes) of 0 and 1.

    Returns:
        `example_loss`: the mean binary cross entropy over all examples and classes, in nats.
        `f1_micro`: F1 over all pairs of a text and a class.
        `f1_macro`: the mean of the classes' F1, which is 0 for a class that neither occurs nor is predicted.
        `accuracy`: the share of texts whose classes are all right.
    """
    from sklearn.metrics import accuracy_score, f1_score

    logits, labels = _first(prediction.predictions), prediction.label_ids
    predicted, expected = logits > 0, labels > 0.5
    loss = F.binary_cross_entropy_with_logits(torch.as_tensor(logits).float(), torch.as_tensor(labels).float())
    return {
        "example_loss": loss.item(),
        "accuracy": float(accuracy_score(expected, predicted)),
        "f1_micro": float(f1_score(expected, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(expected, predicted, average="macro", zero_division=0)),
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The mean squared error of predicted numbers, and their correlations with the labels.

    Args:
        prediction: predictions (examples, 1) and labels (examples,).

    Returns:
        `example_loss` and `mse`: the mean squared error.
        `pearson`, `spearman`: correlations of values and of ranks; 0 if all predictions or all labels are equal.
    """
    from scipy.stats import pearsonr, spearmanr

    predicted = _first(prediction.predictions).astype(np.float64).reshape(-1)
    labels = prediction.label_ids.astype(np.float64).reshape(-1)
    error = float(np.mean((predicted - labels) ** 2))
    constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
    return {
        "example_loss": error,
        "mse": error,
        "pearson": 0.0 if constant else float(pearsonr(predicted, labels).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predicted, labels).statistic),
    }


CLASSIFIER_METRICS: dict[ProblemType, Callable[[EvalPrediction], dict[str, float]]] = {
    "single_label_classification": classification_metrics,
    "multi_label_classification": multi_label_metrics,
    "regression": regression_metrics,
}

METRICS = (
    *("accuracy", "f1", "matthews_correlation", "f1_micro", "f1_macro", "pearson", "spearman", "mse"),
    "perplexity",
)
"""The names of all metrics besides the loss, in the order in which they are shown."""


@torch.no_grad()
def token_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Sum the loss of each example of a causal language model, and count its predicted tokens.

    As the Trainer's `preprocess_logits_for_metrics`, it gathers two numbers per example instead of all logits, and
    duplicates that pad the last batch of a rank are removed before the sum. The Trainer's own loss is a mean of batch
    means.

    Args:
        logits: (batch, tokens, vocabulary), or a tuple that starts with them.
        labels: (batch, tokens), not shifted; -100 is ignored.

    Returns: float32 (batch, 2), the summed loss in nats and the number of predicted tokens.
    """
    # One example at a time: a float32 copy of all logits would often be the largest tensor of an evaluation
    return torch.stack([_token_loss(*example) for example in zip(_first(logits), labels, strict=True)])


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    targets = labels[1:]
    loss = F.cross_entropy(logits[:-1].float(), targets, ignore_index=-100, reduction="sum")
    return torch.stack([loss, (targets != -100).sum().to(loss.dtype)])


def language_model_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss per token in nats and its exponential, the perplexity.

    Args:
        prediction: the output of `token_losses` for all examples, (examples, 2).
    """
    loss, tokens = _first(prediction.predictions).astype(np.float64).sum(axis=0)
    token_loss = loss / tokens
    with np.errstate(over="ignore"):
        return {"token_loss": float(token_loss), "perplexity": float(np.exp(token_loss))}


def _first(outputs):
    """The logits, if the model also returns hidden states, router logits or a cache."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
