"""Builds the arguments of a Trainer from the sections of a recipe."""

import logging
import reprlib
from typing import Any, NamedTuple

import deepspeed
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_zero.data.datasets import PreparedData, prepare_data
from sparse_zero.data.general_text import text_pieces
from sparse_zero.data.metrics import CLASSIFIER_METRICS, METRICS, language_model_metrics, token_losses
from sparse_zero.data.models import (
    add_tokens,
    head_labels,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    meta_model,
    resize_embeddings,
    tokens_without_rows,
)
from sparse_zero.data.packing import check_packing
from sparse_zero.data.quantization import check_trainable
from sparse_zero.data.splits import load_parts
from sparse_zero.errors import UserError, first_line
from sparse_zero.recipe.learning_rate import OTHER_METHODS, default_learning_rate
from sparse_zero.recipe.method import SPARSE, method_of
from sparse_zero.recipe.objective import KEYS
from sparse_zero.recipe.recipe import ProblemType, Recipe
from sparse_zero.recipe.training import TrainingArguments, check_training
from sparse_zero.training.further_evaluation import FurtherData
from sparse_zero.training.quantized_base import loading_dtype, quantization_of_run
from sparse_zero.training.trl_arguments import trl_arguments
from sparse_zero.zero.loading import not_partitioned

logger = logging.getLogger(__name__)


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
    settings |= {key: value for key, value in recipe.training.items() if key not in KEYS}
    if "learning_rate" not in settings:
        objective, method = recipe.training.get("objective"), method_of(recipe.training)
        if method == SPARSE:
            rate = default_learning_rate(recipe.model.task, recipe.sparse.model_density, objective)
        else:
            rate = OTHER_METHODS[recipe.model.task][method]
        settings["learning_rate"] = rate
        logger.warning(
            "training.learning_rate is not set: %g, the default for %s and %s (docs/choosing)",
            rate,
            objective or recipe.model.task,
            recipe.sparse.budget if method == SPARSE else f"method: {method}",
        )
    for key in ("eval_strategy", "logging_strategy", "save_strategy"):
        if settings.get(key) is False:
            settings[key] = "no"  # YAML 1.1 reads no as false
    kind = TrainingArguments
    if recipe.training.get("objective") is not None:
        kind, settings = trl_arguments(recipe, settings)
    try:
        arguments = kind(**settings)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"training: {first_line(error)}") from error
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 0:
        raise UserError(f"training.num_train_epochs: {arguments.num_train_epochs:g} epochs have no step")
    if arguments.deepspeed and torch.distributed.is_initialized():
        # On CPU Accelerate initialises torch's process group but not DeepSpeed's, and at stage 3 from_pretrained would
        # assume a world size of 1.
        deepspeed.init_distributed(verbose=False)
    return arguments


class Built(NamedTuple):
    """What a recipe's model and data sections describe."""

    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedData
    model: PreTrainedModel
    new_tokens: list[str]
    """The tokens with new rows in the embeddings: the recipe's, and those that the base model had no rows for."""
    further: FurtherData


def build(recipe: Recipe, arguments: TrainingArguments) -> Built:
    """Load the tokenizer, the tokenised examples and the base model. A collective call: the first rank of each host
    prepares the data, and the others read its cache.

    Raises UserError: see `load_parts`, `prepare_data`, `text_pieces` and `load_model`.
    """
    section = recipe.model
    origin = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    tokenizer = build_tokenizer(recipe)
    config = load_config(section.source, **origin)
    with arguments.main_process_first(desc="data"):
        train, evaluation, test = load_parts(recipe.data)
        prepared = prepare_data(
            recipe.data,
            section.task,
            tokenizer,
            train,
            evaluation,
            max_positions(config),
            section.problem_type,
            head_labels(config),
            test=test,
        )
    settings: dict[str, Any] = {}
    labels = prepared.labels
    if labels is not None:
        check_classifier_training(labels.problem_type, arguments)
        settings["id2label"] = labels.id2label
        settings["label2id"] = {label: index for index, label in labels.id2label.items()}
        settings["problem_type"] = labels.problem_type
        settings["pad_token_id"] = tokenizer.pad_token_id
    model, new_tokens = build_model(recipe, arguments, tokenizer, settings, labels is not None and labels.starts_anew)
    if recipe.data.packing:
        rows = max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
        check_packing(model.config._attn_implementation, rows)
        # With a cache, transformers does not look for packed examples
        model.config.use_cache = False
        if arguments.use_cache:
            raise UserError("training.use_cache: packed examples see each other with a cache; leave it out")
    return Built(tokenizer, prepared, model, new_tokens, _further_data(recipe, tokenizer, prepared))


def _further_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prepared: PreparedData) -> FurtherData:
    file = recipe.data.forgetting
    if file is None:
        return FurtherData(prepared.test)
    text = text_pieces(file, tokenizer, prepared.max_length)
    # Only packed examples have them
    return FurtherData(prepared.test, text if recipe.data.packing else text.remove_columns("position_ids"), file)


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load a recipe's tokenizer, with its new tokens."""
    section = recipe.model
    # The model's revision does not apply to a tokenizer from another repository
    origin = {"revision": None if section.tokenizer else section.revision}
    tokenizer = load_tokenizer(
        section.tokenizer or section.source, **origin, trust_remote_code=section.trust_remote_code
    )
    add_tokens(tokenizer, section.new_tokens)
    return tokenizer


def build_model(
    recipe: Recipe,
    arguments: transformers.TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    new_head: bool,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a recipe's base model, with embeddings for all of the tokenizer's tokens.

    Args: settings, new_head: see `load_model`.

    Returns: the model, and the tokens with new rows: those of the recipe, and those that it had no rows for.
    """
    section = recipe.model
    quantization = None
    if section.quantization is not None:
        config = load_config(section.source, section.revision, section.trust_remote_code)
        check_trainable(section.source, config, section.quantization)
        with not_partitioned():
            plain = meta_model(config, section.task, torch.float32, section.trust_remote_code)
            quantization = quantization_of_run(recipe, arguments, config, plain)
    model = load_model(
        section.source,
        section.task,
        dtype=section.dtype or loading_dtype(recipe, arguments),
        quantization=quantization,
        settings=settings,
        new_head=new_head,
        attn_implementation=section.attn_implementation,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    without_rows = tokens_without_rows(model, tokenizer)
    if without_rows and without_rows != section.new_tokens:
        logger.warning(
            "the tokenizer has %d tokens, the embedding of %s has %d rows: rows are added for %s and trained in full",
            len(tokenizer),
            section.source,
            len(tokenizer) - len(without_rows),
            reprlib.repr(without_rows),
        )
    resize_embeddings(model, tokenizer)
    return model, list(dict.fromkeys([*without_rows, *section.new_tokens]))


def check_classifier_training(problem_type: ProblemType, arguments: TrainingArguments) -> None:
    """Raise UserError if the Trainer would compute another loss than that of the problem type."""
    if arguments.label_smoothing_factor and problem_type != "single_label_classification":
        raise UserError(f"training.label_smoothing_factor: labels of {problem_type} cannot be smoothed; leave it out")


def evaluation_settings(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of a Trainer for an evaluation: the examples, the collator and the metrics."""
    shared = {
        "eval_dataset": prepared.evaluation,
        "data_collator": prepared.collator,
        "processing_class": tokenizer,
    }
    if prepared.labels is not None:
        return shared | {"compute_metrics": CLASSIFIER_METRICS[prepared.labels.problem_type]}
    return shared | {"compute_metrics": language_model_metrics, "preprocess_logits_for_metrics": token_losses}


def evaluation_results(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of the model among the results of Trainer.evaluate, without the prefix `eval_` and without timings.

    The loss is the mean over all examples, or over all tokens of a language model, for any number of ranks. (The
    Trainer's own eval_loss is the mean of the batches' means.)
    """
    results = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    results["loss"] = results.get("token_loss", results.get("example_loss"))
    return {name: results[name] for name in (*METRICS, "loss") if results.get(name) is not None}
