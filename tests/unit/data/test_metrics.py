import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.exceptions import UndefinedMetricWarning
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparse_zero.data.metrics import classification_metrics, language_model_metrics, token_losses


def predict(predicted: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted]


def test_two_classes_are_scored_as_positive_and_negative():
    # 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
    labels, predicted = [1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]
    scores = classification_metrics(EvalPrediction(predict(predicted, 2), np.array(labels)))
    assert scores["accuracy"] == pytest.approx(5 / 8)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert scores["matthews_correlation"] == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))


def test_f1_of_three_classes_is_their_mean():
    labels, predicted = [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]
    scores = classification_metrics(EvalPrediction(predict(predicted, 3), np.array(labels)))
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 4 / 5) / 3)


def test_logits_come_first_among_several_outputs():
    labels = np.array([0, 1, 1])
    outputs = (predict([0, 1, 0], 2), np.zeros((3, 4, 5)))
    assert classification_metrics(EvalPrediction(outputs, labels))["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("labels", [[0, 1, 1], [0, 0, 0]])
def test_a_classifier_that_gives_one_answer_scores_zero_where_a_score_is_undefined(labels, recwarn):
    scores = classification_metrics(EvalPrediction(predict([0, 0, 0], 2), np.array(labels)))
    assert (scores["f1"], scores["matthews_correlation"]) == (0, 0)
    assert not any(issubclass(warning.category, UndefinedMetricWarning) for warning in recwarn.list)


def test_token_losses_shift_and_ignore():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[3, 1, 2, -100, 4], [-100, -100, -100, 6, -100]])
    losses = token_losses((logits, "more"), labels)
    log = F.log_softmax(logits, -1)
    first = -(log[0, 0, 1] + log[0, 1, 2] + log[0, 3, 4])
    assert torch.allclose(losses, torch.tensor([[first, 3], [-log[1, 2, 6], 1]]))


def test_token_losses_are_computed_in_float32():
    logits, labels = (10 * torch.randn(1, 200, 50)).bfloat16(), torch.randint(50, (1, 200))
    losses = token_losses(logits, labels)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, token_losses(logits.float(), labels))


def test_loss_is_weighted_by_tokens_not_by_examples():
    scores = language_model_metrics(EvalPrediction(np.array([[9.0, 3], [1, 1]], dtype=np.float32), None))
    assert scores["token_loss"] == pytest.approx(10 / 4)
    assert scores["perplexity"] == pytest.approx(math.exp(2.5))


def test_perplexity_too_large_for_a_float_is_infinite(recwarn):
    scores = language_model_metrics(EvalPrediction(np.array([[1e4, 1]]), None))
    assert scores["perplexity"] == math.inf
    assert not recwarn.list


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_trainer_reports_the_same_token_loss_for_any_batch_size(batch_size, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight)
    rows = [torch.randint(20, (length,)).tolist() for length in (12, 2, 3, 9)]
    examples = Dataset.from_list(
        [{"input_ids": ids + [0] * (12 - len(ids)), "labels": ids + [-100] * (12 - len(ids))} for ids in rows]
    )
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True),
        eval_dataset=examples,
        compute_metrics=language_model_metrics,
        preprocess_logits_for_metrics=token_losses,
    )
    expected = 0.0
    with torch.no_grad():
        for ids in rows:
            logits = model(torch.tensor([ids])).logits[0]
            expected += F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    assert trainer.evaluate()["eval_token_loss"] == pytest.approx(expected / (11 + 1 + 2 + 8), abs=1e-5)
