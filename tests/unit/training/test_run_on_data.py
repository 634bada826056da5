"""Whole runs of tiny models in one process on data of other kinds: what is trained, evaluated, refused and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rpn import RPNConfig
from sparse_zero import UserError, load_adapter
from sparse_zero.recipe import shipped
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.evaluate import evaluate
from sparse_zero.training.rate_search import find_rate
from sparse_zero.training.run import train


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a recipe of a saved model on rows; returns the results."""
    monkeypatch.chdir(tmp_path)

    def run(task: str, columns: dict[str, str], rows: list[dict], merge: bool = False, **sections: dict) -> dict:
        return train(recipe(tmp_path, task, columns, rows, **sections), "r.yaml", merge=merge)

    return run


def recipe(folder: Path, task: str, columns: dict[str, str], rows: list[dict], **sections: dict) -> Recipe:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training: dict[str, Any] = {"output_dir": "run", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    training |= {"learning_rate": 1e-2, "max_steps": 2, "run_name": "r"} | sections.pop("training", {})
    data = {"path": "data.jsonl", "columns": columns, "eval_split": "train"} | sections.pop("data", {})
    model = {"name": "model", "task": task} | sections.pop("model", {})
    return Recipe(model=model, data=data, training=training, sparse={"density": 0.2, "targets": "all"})


@pytest.fixture
def save(tmp_path, tokenizer):
    """Saves a model with a tokenizer as the base model."""

    def save(model, tokens=tokenizer):
        model.save_pretrained(tmp_path / "model")
        tokens.save_pretrained(tmp_path / "model")
        return model

    return save


def bert(vocabulary: int = 2000, **settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=vocabulary, **sizes, **settings))


CLASSES = {"text": "text", "label": "label"}
TEXTS = ["a good film", "bad", "it is what it is", "one of the worst"] * 5


def test_several_classes_for_each_text(run, save):
    save(bert(problem_type="regression"))
    rows = [{"text": text, "label": [["joy"], ["fear", "joy"], []][row % 3]} for row, text in enumerate(TEXTS)]
    results = run("sequence-classification", CLASSES, rows, merge=True, training={"max_steps": 30})
    assert results["loss"] < results["loss_before"]
    assert {"f1_micro", "f1_macro", "accuracy"} <= results.keys()
    merged = AutoModelForSequenceClassification.from_pretrained("run/merged")
    assert merged.config.problem_type == "multi_label_classification"
    assert merged.config.id2label == {0: "fear", 1: "joy"}


def test_regression(run, save):
    save(bert())
    rows = [{"text": text, "label": len(text) / 10 + 0.05} for text in TEXTS]
    results = run("sequence-classification", CLASSES, rows, merge=True, training={"max_steps": 60})
    assert results["mse"] == results["loss"] < results["loss_before"]
    assert results["pearson"] > 0.8
    merged = AutoModelForSequenceClassification.from_pretrained("run/merged")
    assert (merged.config.problem_type, merged.config.num_labels) == ("regression", 1)
    again = evaluate(recipe(Path(), "sequence-classification", CLASSES, rows), "run/adapter")
    assert again["mse"] == pytest.approx(results["mse"], rel=1e-5)


def test_label_smoothing_of_numbers_is_refused(run, save):
    save(bert())
    rows = [{"text": text, "label": 0.5} for text in TEXTS]
    with pytest.raises(UserError, match="label_smoothing_factor: labels of regression cannot be smoothed"):
        run("sequence-classification", CLASSES, rows, training={"label_smoothing_factor": 0.1})


def test_a_checkpoints_own_classes_are_right_before_training(run, save, tokenizer):
    model = save(bert(id2label={0: "POSITIVE", 1: "NEGATIVE"}, label2id={"POSITIVE": 0, "NEGATIVE": 1})).eval()
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            predicted = model(**tokenizer(text, return_tensors="pt")).logits.argmax().item()
        rows.append({"text": text, "label": ["positive", "negative"][predicted]})
    results = run("sequence-classification", CLASSES, rows, training={"max_steps": 1})
    assert results["accuracy_before"] == 1


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(task, run, save, tokenizer, caplog):
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new pad>", "additional_special_tokens": ["<call>"]})
    save(tiny("llama", vocab_size=rows) if task == "causal-lm" else bert(rows), tokenizer)
    columns = {"text": "text"} if task == "causal-lm" else CLASSES
    data = [{"text": f"<call> {text}", "label": row % 2} for row, text in enumerate(TEXTS)]
    results = run(task, columns, data, merge=True, training={"max_steps": 3})
    assert f"has {rows} rows: rows are added for ['<new pad>', '<call>'] and trained in full" in caplog.text
    auto = {"causal-lm": AutoModelForCausalLM, "sequence-classification": AutoModelForSequenceClassification}[task]
    merged, tokens = auto.from_pretrained("run/merged").eval(), AutoTokenizer.from_pretrained("run/merged")
    assert merged.get_input_embeddings().weight.shape[0] == len(tokens) == rows + 2
    again = evaluate(recipe(Path(), task, columns, data), "run/adapter")
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-5)
    assert merged.config.pad_token_id == tokens.pad_token_id == rows


def opt(vocabulary: int) -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=vocabulary, max_position_embeddings=64, word_embed_proj_dim=32, **sizes)
    return OPTForCausalLM(config)


def loud(model):
    """Attention with the small default initialisation would hardly change the logits."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_packing_keeps_the_loss_before_training(run, save, tokenizer):
    save(loud(tiny("llama", vocab_size=len(tokenizer))))
    rows, losses = [{"text": text} for text in TEXTS], []
    for packing in (False, True):
        data = {"packing": packing, "max_length": 32}
        losses.append(run("causal-lm", {"text": "text"}, rows, data=data, training={"output_dir": str(packing)}))
    assert losses[1]["train_examples"] < losses[0]["train_examples"]
    assert losses[1]["loss_before"] == pytest.approx(losses[0]["loss_before"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_packing_is_refused_where_examples_see_each_other(batch_size, run, save, tokenizer):
    save(loud(opt(len(tokenizer))))
    rows = [{"text": text} for text in TEXTS]
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    with pytest.raises(UserError, match=r"data\.packing: with OPTForCausalLM and sdpa attention packed examples see"):
        run("causal-lm", {"text": "text"}, rows, data={"packing": True, "max_length": 32}, training=sizes)
    assert not Path("run/adapter").exists()


def test_packing_with_a_cache_is_refused(run, save, tokenizer):
    save(tiny("llama", vocab_size=len(tokenizer)))
    rows = [{"text": text} for text in TEXTS]
    with pytest.raises(UserError, match=r"training\.use_cache: packed examples see each other with a cache"):
        run("causal-lm", {"text": "text"}, rows, data={"packing": True}, training={"use_cache": True})


@pytest.mark.parametrize("batch_size", [16, 32])
def test_drop_last_leaves_no_evaluation_example_out(batch_size, run, save):
    save(bert())
    rows = [{"text": text, "label": row % 2} for row, text in enumerate(TEXTS)]
    last = {"per_device_eval_batch_size": batch_size, "dataloader_drop_last": True}
    dropped = run("sequence-classification", CLASSES, rows, training=last)
    kept = run("sequence-classification", CLASSES, rows, training={"output_dir": "kept"})
    assert dropped["loss_before"] == pytest.approx(kept["loss_before"], rel=1e-5)
    assert dropped["eval_examples"] == 20


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"per_device_train_batch_size": 64, "dataloader_drop_last": True},
            "dataloader_drop_last: 20 training examples are fewer than the 64 x 1 of one batch on each rank",
        ),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs: 0 epochs have no step"),
    ],
)
def test_a_run_without_a_step_is_refused(training, message, run, save):
    save(bert())
    rows = [{"text": text, "label": row % 2} for row, text in enumerate(TEXTS)]
    with pytest.raises(UserError, match=message):
        run("sequence-classification", CLASSES, rows, training=training)
    assert not Path("run/adapter").exists()


def test_an_adapter_with_added_rows_opens_on_the_base_model(run, save, tokenizer):
    rows = len(tokenizer)
    tokenizer.add_tokens(["<call>"])
    save(tiny("llama", vocab_size=rows), tokenizer)
    run("causal-lm", {"text": "text"}, [{"text": f"<call> {text}"} for text in TEXTS])
    model = AutoModelForCausalLM.from_pretrained("model")
    with pytest.raises(UserError, match=r"resize_token_embeddings|embed_tokens"):
        load_adapter(model, "run/adapter")


@pytest.mark.parametrize("noise", [False, True])
def test_rates_are_tried_from_the_same_start(noise, tmp_path, monkeypatch, save, tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    save(loud(tiny("llama", vocab_size=len(tokenizer))))
    rows = [{"text": text} for text in TEXTS]
    made = recipe(tmp_path, "causal-lm", {"text": "text"}, rows, training={"max_steps": 3, "learning_rate": 1e-2})
    if noise:
        made = made.model_copy(update={"rpn": RPNConfig(probability=0.2)})
    found = find_rate(made, "r.yaml")
    rates = [each["learning_rate"] for each in found["rates"]]
    assert rates == pytest.approx([1e-2 / 9, 1e-2 / 3, 1e-2, 3e-2, 9e-2], rel=0.05)
    losses = [each["loss"] for each in found["rates"]]
    assert found["chosen"] == rates[losses.index(min(losses))]
    assert min(losses) < found["loss_before"]
    assert f"training.learning_rate={found['chosen']:g}" in capsys.readouterr().out
    assert json.loads(Path("run/learning_rates.json").read_text()) == found
    assert not Path("run/adapter").exists()
    # A run of the last rate alone has the same loss, so nothing was left of the rates before it
    alone = made.training | {"learning_rate": rates[-1], "lr_scheduler_type": "constant"}
    results = train(made.model_copy(update={"training": alone}), "r.yaml")
    assert results["loss_before"] == pytest.approx(found["loss_before"], rel=1e-6)
    assert results["loss"] == pytest.approx(losses[-1], rel=1e-5)


def test_rates_of_a_partitioned_base_model_are_refused(tmp_path, monkeypatch, save, tokenizer):
    monkeypatch.chdir(tmp_path)
    save(tiny("llama", vocab_size=len(tokenizer)))
    made = recipe(tmp_path, "causal-lm", {"text": "text"}, [{"text": "a"}], training={"deepspeed": "zero3.json"})
    made = made.with_files({"training.deepspeed": str(shipped.directory() / "zero3.json")})
    try:
        with pytest.raises(UserError, match=r"--find-rate: the base model must fit on one device"):
            find_rate(made, "r.yaml")
    finally:
        unset_hf_deepspeed_config()


def test_a_run_on_changed_copies_of_the_texts(run, save):
    save(bert())
    rows = [{"text": text, "label": row % 2} for row, text in enumerate(TEXTS)]
    results = run("sequence-classification", CLASSES, rows, data={"augment": "aeda", "augment_copies": 2})
    assert (results["train_examples"], results["eval_examples"]) == (60, 20)
