"""Kinds of labels: classes in a checkpoint's order, several classes for each text, and numbers."""

import numpy as np
import pytest
import torch
from data_cases import CLASSES, section
from datasets import ClassLabel, Dataset, Features, List
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, LlamaConfig

from sparse_zero.data.datasets import prepare_data
from sparse_zero.data.labels import read_labels
from sparse_zero.data.metrics import multi_label_metrics, regression_metrics
from sparse_zero.data.models import head_labels, load_model
from sparse_zero.errors import UserError


def labels_of(values, head=None, problem_type=None, feature=None):
    features = Features({"label": feature}) if feature else None
    split = Dataset.from_dict({"label": values}, features=features)
    labels = read_labels("label", {"training": split}, problem_type, head)
    return labels, labels.targets("training", split["label"][:])


NAMED = {0: "POSITIVE", 1: "NEGATIVE"}
UNNAMED = {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize(
    ("values", "head", "ids", "names"),
    [
        (["negative", "positive"], NAMED, [1, 0], NAMED),
        ([" Negative", "POSITIVE"], NAMED, [1, 0], NAMED),
        (["LABEL_1", "label_0"], NAMED, [1, 0], NAMED),
        ([1, 0], NAMED, [1, 0], NAMED),
        (["LABEL_1", "LABEL_0"], UNNAMED, [1, 0], UNNAMED),
        # Only some of the head's classes occur
        (["c", "a"], {0: "a", 1: "b", 2: "c"}, [2, 0], {0: "a", 1: "b", 2: "c"}),
        # Two of five stars are not the ids 1 and 2
        ([1, 2], dict(enumerate("abc")), [0, 1], {0: "1", 1: "2"}),
        (["b", "a"], None, [1, 0], {0: "a", 1: "b"}),
    ],
)
def test_labels_are_matched_to_the_checkpoints_head_by_name(values, head, ids, names):
    labels, targets = labels_of(values, head)
    assert (targets, labels.id2label, labels.starts_anew) == (ids, names, False)


def test_a_class_label_feature_is_matched_by_name():
    labels, targets = labels_of([0, 1], NAMED, feature=ClassLabel(names=["negative", "positive"]))
    assert (targets, labels.id2label) == ([1, 0], NAMED)


def test_a_head_of_other_classes_starts_anew_and_that_is_said(caplog):
    labels, targets = labels_of(["b", "a"], {0: "x", 1: "y"})
    assert (targets, labels.id2label, labels.starts_anew) == ([1, 0], {0: "a", 1: "b"}, True)
    assert (
        "the checkpoint's head has the classes ['x', 'y'], the data has ['a', 'b']: the head starts anew"
        in caplog.text
    )


def test_the_order_of_a_head_without_names_is_said(caplog):
    labels, _ = labels_of(["b", "a"], UNNAMED)
    assert not labels.starts_anew
    assert "have no names (LABEL_0, ...): they are taken for ['a', 'b'], in this order" in caplog.text


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (None, [["joy", "fear"], [], ["joy"]], {0: "fear", 1: "joy"}),
        (None, [[3, 1], [], [3]], {0: "1", 1: "3"}),
        (List(ClassLabel(names=["fear", "joy"])), [[1, 0], [], [1]], {0: "fear", 1: "joy"}),
    ],
)
def test_lists_are_several_classes(feature, values, names):
    labels, targets = labels_of(values, feature=feature)
    assert labels.problem_type == "multi_label_classification"
    assert labels.id2label == names
    assert targets == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]


def test_numbers_with_fractions_are_regression():
    labels, targets = labels_of([0.5, 2.0, -1.25])
    assert (labels.problem_type, targets) == ("regression", [0.5, 2.0, -1.25])
    labels, targets = labels_of([1, 5, 3], problem_type="regression")
    assert (labels.problem_type, targets, labels.id2label) == ("regression", [1.0, 5.0, 3.0], {0: "LABEL_0"})
    assert labels_of([1.0, 0.0])[0].problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("values", "problem_type", "message"),
    [
        ([[0, 1, 1], [1, 0, 0]], None, "names a label twice; give each text the list of its labels, not an indicator"),
        ([[0.5], [1.0]], None, "lists of float64; several labels are a list of strings or integers"),
        ([["a", None]], None, "missing value within the list"),
        ([[], []], None, "has lists of|no label at all"),
        (["a", "b"], "regression", "has the type string; regression needs numbers"),
        ([0.5, float("nan")], None, "has nan, not a number"),
        ([0.5, 1.0], "single_label_classification", "does not fit column 'label', which has numbers with fractions"),
        (["a", "b"], "multi_label_classification", "which has single labels"),
        ([["a"]], "single_label_classification", "which has lists"),
        ([["a"]], "regression", "which has lists"),
    ],
)
def test_labels_that_cannot_be_used(values, problem_type, message):
    with pytest.raises(UserError, match=message):
        labels_of(values, problem_type=problem_type)


def test_lists_in_one_split_only_are_refused():
    splits = {"training": Dataset.from_dict({"label": [["a"]]}), "evaluation": Dataset.from_dict({"label": ["a"]})}
    with pytest.raises(UserError, match="lists in one split and single labels in the other"):
        read_labels("label", splits)


def test_multi_label_metrics_count_pairs_and_classes():
    logits = np.array([[2.0, -1.0, 3.0], [-2.0, 1.0, -0.5]], dtype=np.float32)
    labels = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.float32)
    metrics = multi_label_metrics(EvalPrediction(logits, labels))
    # By hand: classes 0 and 1 are right, class 2 is wrong twice. Pairs: 2 right, 1 false positive, 1 false negative
    assert metrics["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["f1_macro"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["accuracy"] == 0
    probability = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(probability) + (1 - labels) * np.log(1 - probability)).mean()
    assert metrics["example_loss"] == pytest.approx(expected, rel=1e-5)


def test_regression_metrics_are_correlations_and_the_squared_error():
    predicted, labels = np.array([[1.0], [2.0], [4.0]], dtype=np.float32), np.array([1.0, 3.0, 9.0], dtype=np.float32)
    metrics = regression_metrics(EvalPrediction(predicted, labels))
    assert metrics["mse"] == metrics["example_loss"] == pytest.approx((0 + 1 + 25) / 3)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(predicted[:, 0], labels)[0, 1])
    assert metrics["spearman"] == pytest.approx(1)
    constant = regression_metrics(EvalPrediction(np.ones((3, 1)), labels))
    assert (constant["pearson"], constant["spearman"]) == (0, 0)


BERT = {
    "vocab_size": 2000,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def checkpoint(tmp_path):
    """A regression checkpoint with two outputs, as its config says."""
    torch.manual_seed(0)
    config = BertConfig(**BERT, problem_type="regression", id2label=NAMED, label2id={"POSITIVE": 0, "NEGATIVE": 1})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("values", "labels", "loss"),
    [
        (["negative", "positive"], torch.tensor([1, 0]), torch.nn.functional.cross_entropy),
        (
            [["negative"], ["negative", "positive"]],
            torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
        ([0.5, 1.5], torch.tensor([0.5, 1.5]), lambda logits, labels: ((logits[:, 0] - labels) ** 2).mean()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_labels_not_of_the_checkpoint(values, labels, loss, dtype, checkpoint, tokenizer):
    model = load_model(str(checkpoint), "sequence-classification")
    assert head_labels(model.config) == NAMED
    dataset = Dataset.from_dict({"text": ["a good film", "bad"], "label": values})
    data = prepare_data(
        section("unused", CLASSES), "sequence-classification", tokenizer, dataset, dataset, 512, head=NAMED
    )
    settings = {"id2label": data.labels.id2label, "problem_type": data.labels.problem_type}
    model = load_model(str(checkpoint), "sequence-classification", dtype=dtype, settings=settings).eval()
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["labels"].tolist() == labels.tolist()
    output = model(**batch)
    assert output.loss.item() == pytest.approx(loss(output.logits.float(), labels).item(), rel=1e-2)
    output.loss.backward()


def test_a_head_that_starts_anew_is_drawn_again_and_the_rest_is_kept(checkpoint):
    kept = load_model(str(checkpoint), "sequence-classification")
    torch.manual_seed(1)
    anew = load_model(str(checkpoint), "sequence-classification", new_head=True)
    for (name, old), new in zip(kept.named_parameters(), anew.parameters(), strict=True):
        assert torch.equal(old, new) == (name != "classifier.weight"), name
    assert anew.classifier.weight.std().item() == pytest.approx(anew.config.initializer_range, rel=0.5)


def test_a_language_model_has_no_head_for_classes():
    assert head_labels(LlamaConfig(architectures=["LlamaForCausalLM"])) is None
    assert head_labels(LlamaConfig()) is None
