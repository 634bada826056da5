"""Test examples, and the loss on a text before and after training, as the results of a run have them."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_zero import UserError, load_adapter
from sparse_zero.data.general_text import text_pieces
from sparse_zero.data.splits import load_parts
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training.evaluate import evaluate


def loss_on(model, tokenizer, text: str, length: int) -> float:
    """The mean loss per token of a text in pieces, in plain torch."""
    ids, total, count = tokenizer(text).input_ids, 0.0, 0
    for start in range(0, len(ids), length):
        piece = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            logits = model(piece).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
        count += piece.shape[1] - 1
    return total / count


def test_test_examples_and_the_loss_on_a_text(recipe, train, recipe_base, tmp_path) -> None:
    rows = [json.loads(line) for line in (recipe_base / "train.jsonl").read_text().splitlines()]
    text = " ".join(row["text"] for row in rows)
    (tmp_path / "text.txt").write_text(text)
    file = recipe("run", data={"test_size": 7, "forgetting": "text.txt", "max_length": 24})
    results = train(file)
    assert (results["eval_examples"], results["test_examples"]) == (12, 7)
    assert results["test"]["loss"] == pytest.approx(math.log(results["test"]["perplexity"]))
    base = AutoModelForCausalLM.from_pretrained(recipe_base / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe_base / "base")
    found = results["forgetting"]
    assert found["loss_before"] == pytest.approx(loss_on(base, tokenizer, text, 24), rel=1e-5)
    load_adapter(base, tmp_path / "run" / "adapter")
    assert found["loss"] == pytest.approx(loss_on(base.eval(), tokenizer, text, 24), rel=1e-5)
    assert found["change"] == found["loss"] - found["loss_before"] != 0
    # The test examples, evaluated by themselves
    _, evaluation, test = load_parts(load_recipe(file).data)
    both = [*evaluation, *test]
    assert sorted(map(str, both)) == sorted(map(str, load_parts(load_recipe(recipe("other")).data)[1]))
    (tmp_path / "of_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    alone = recipe(
        "alone",
        data={
            "data_files": {"train": str(recipe_base / "train.jsonl"), "test": str(tmp_path / "of_test.jsonl")},
            "max_length": 24,
        },
    )
    again = evaluate(load_recipe(alone), tmp_path / "run" / "adapter")
    assert again["loss"] == pytest.approx(results["test"]["loss"], rel=1e-6)
    # What was measured before training is in the checkpoints
    for step in (3, 4):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    resumed = train(file, resume="auto")
    assert (resumed["forgetting"], resumed["test"]) == (results["forgetting"], results["test"])


def test_nothing_of_a_run_changes_by_further_evaluations(recipe, train) -> None:
    plain = train(recipe("plain", data={"eval_split": "test", "eval_size": 12}))
    further = train(recipe("further", data={"eval_size": 12, "test_split": "test", "forgetting": "shipped"}))
    assert further["loss"] == plain["loss"]
    assert further["test_examples"] == 19
    assert further["forgetting"]["tokens"] > 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test_size": 19}, "data.test_size: 19 takes all 19 evaluation examples"),
        ({"test_size": 30}, "data.test_size: 30 means 30 examples; the split has 19"),
        ({"test_split": "tset"}, "data.test_split: 'json' has no split 'tset'; did you mean 'test'?"),
    ],
)
def test_test_examples_that_are_not_there(recipe, data, message) -> None:
    with pytest.raises(UserError, match=message):
        load_parts(load_recipe(recipe("run", data=data)).data)


def test_a_text_that_is_none(recipe, tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match=r"data.forgetting: no file 'nowhere.txt' beside the recipe"):
        load_recipe(recipe("run", data={"forgetting": "nowhere.txt"}))
    for name, content, message in (("a", b"\xff\xfe\xff", "cannot be read as text"), ("b", b"", "has no two tokens")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            text_pieces(str(tmp_path / name), tokenizer, None)
    with pytest.raises(UserError, match="only causal language models have a loss on a text"):
        load_recipe(
            recipe(
                "other",
                model={"task": "sequence-classification"},
                data={"forgetting": "shipped", "columns": {"text": "text", "label": "label"}},
            )
        )
