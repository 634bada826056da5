"""Builds the arguments of a Trainer from the sections of a recipe."""

from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_zero.data.datasets import PreparedData, load_splits, prepare_data
from sparse_zero.data.metrics import classification_metrics, language_model_metrics, token_losses
from sparse_zero.data.models import (
    add_tokens,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    resize_embeddings,
)
from sparse_zero.data.packing import check_packing
from sparse_zero.errors import UserError, first_line
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.training import TrainingArguments, check_training


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The TrainingArguments of a recipe's `training` section. By default a run evaluates before training and logs to
    TensorBoard.

    Call this after the process group is initialised and before the model is loaded: at ZeRO stage 3 it makes
    from_pretrained partition the weights while it loads them.

    Raises UserError: an unknown key, or a value that TrainingArguments rejects.
    """
    check_training(recipe.training)
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    settings = {
        "report_to": "tensorboard",
        "eval_on_start": True,
        "use_cpu": devices == 0,
        # Every rank draws the same positions, so there is nothing to broadcast
        "ddp_broadcast_buffers": False,
    }
    settings |= recipe.training
    for key in ("eval_strategy", "logging_strategy", "save_strategy"):
        if settings.get(key) is False:
            settings[key] = "no"  # YAML 1.1 reads no as false
    try:
        arguments = TrainingArguments(**settings)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"training: {first_line(error)}") from error
    if arguments.deepspeed and torch.distributed.is_initialized():
        # On CPU Accelerate initialises torch's process group but not DeepSpeed's, and at stage 3 from_pretrained would
        # assume a world size of 1.
        deepspeed.init_distributed(verbose=False)
    return arguments


def build(
    recipe: Recipe, arguments: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, PreparedData, PreTrainedModel]:
    """Load the tokenizer, the tokenised examples and the base model. A collective call: the first rank of each host
    prepares the data, and the others read its cache.

    Raises UserError: see `load_splits`, `prepare_data` and `load_model`.
    """
    section = recipe.model
    origin = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    # The model's revision does not apply to a tokenizer from another repository
    tokenizer = load_tokenizer(
        section.tokenizer or section.name, **origin | ({"revision": None} if section.tokenizer else {})
    )
    add_tokens(tokenizer, section.new_tokens)
    limit = max_positions(load_config(section.name, **origin))
    with arguments.main_process_first(desc="data"):
        prepared = prepare_data(recipe.data, section.task, tokenizer, *load_splits(recipe.data), limit)
    settings: dict[str, Any] = {}
    if prepared.id2label is not None:
        settings["id2label"] = prepared.id2label
        settings["label2id"] = {label: index for index, label in prepared.id2label.items()}
        settings["pad_token_id"] = tokenizer.pad_token_id
    model = load_model(
        section.name,
        section.task,
        dtype=section.dtype or ("bfloat16" if arguments.bf16 and arguments.deepspeed else "float32"),
        settings=settings,
        attn_implementation=section.attn_implementation,
        **origin,
    )
    if section.new_tokens:
        resize_embeddings(model, tokenizer)
    if recipe.data.packing:
        rows = max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
        check_packing(model.config._attn_implementation, rows)
    return tokenizer, prepared, model


def evaluation_settings(recipe: Recipe, prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of a Trainer for the evaluation of a recipe: the examples, the collator and the metrics."""
    shared = {
        "eval_dataset": prepared.evaluation,
        "data_collator": prepared.collator,
        "processing_class": tokenizer,
    }
    if recipe.model.task == "sequence-classification":
        return shared | {"compute_metrics": classification_metrics}
    return shared | {"compute_metrics": language_model_metrics, "preprocess_logits_for_metrics": token_losses}


def evaluation_results(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of the model among the results of Trainer.evaluate, without the prefix `eval_` and without timings.

    The loss is the mean over all examples, or over all tokens of a language model, for any number of ranks. (The
    Trainer's own eval_loss is the mean of the batches' means.)
    """
    results = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    results["loss"] = results.get("token_loss", results.get("example_loss"))
    names = ("accuracy", "f1", "matthews_correlation", "perplexity", "loss")
    return {name: results[name] for name in names if results.get(name) is not None}
