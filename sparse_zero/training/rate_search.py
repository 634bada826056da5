"""Tries several learning rates on a few steps each, from the same deltas, and says which one it would take."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from sparse_zero.errors import UserError
from sparse_zero.json_text import json_text
from sparse_zero.model.sparse_model import refresh
from sparse_zero.model.sparsify import sparsify_chosen
from sparse_zero.recipe.method import refuse_method
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.build import build, evaluation_settings, training_arguments
from sparse_zero.training.device import device_name
from sparse_zero.training.recipe_check import check_recipe
from sparse_zero.training.results_table import print_rates
from sparse_zero.training.run import config_with_tokens, noisy_objective
from sparse_zero.training.selection_examples import choose_by_examples
from sparse_zero.training.trainer import SparseTrainer

logger = logging.getLogger(__name__)

FACTORS = (1 / 9, 1 / 3, 1, 3, 9)
"""The rates that are tried, as multiples of the recipe's."""

STEPS = 20
"""Optimizer steps with each rate, unless the recipe has fewer."""

FILE = "learning_rates.json"

EXAMPLES = 200
"""Held-out examples, at most, on which the loss is measured."""


def find_rate(recipe: Recipe, path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a few steps with each of five learning rates, and measure the loss on held-out examples.

    A collective call. The base model is loaded once; the deltas start from the same values for each rate, with a
    constant schedule. DeepSpeed is not used: without it the optimizer's state of the few trained scalars is on every
    rank.

    Args:
        recipe: the recipe.
        path: its file, for the next command in the printed table.
        overrides: with which it was loaded, also for the next command.

    Returns: `rates`: for each rate its loss (None if it is not finite); `loss_before`; `chosen`: the rate with the
        lowest loss; `steps`, `device`. Also written to OUTPUT_DIR/learning_rates.json.

    Raises UserError: see `build`; the recipe partitions the base model (stage 3), or has another method than sparse.
    """
    refuse_method(recipe.training, "--find-rate")
    arguments = training_arguments(recipe)
    if arguments.deepspeed and arguments.hf_deepspeed_config.is_zero3():
        raise UserError(
            "--find-rate: the base model must fit on one device, but training.deepspeed partitions it (stage 3); set "
            "training.deepspeed=zero2.json, or try the rates on a smaller model of the family"
        )
    check_recipe(recipe, arguments)
    recipe = _without_deepspeed(recipe, arguments)
    arguments = training_arguments(recipe)
    set_seed(arguments.seed)
    tokenizer, prepared, model, new_tokens, _ = build(recipe, arguments)
    choose = choose_by_examples(model, recipe.sparse, prepared, arguments)
    sparsify_chosen(model, config_with_tokens(recipe.sparse, new_tokens, tokenizer), choose=choose)
    objective = noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids)
    settings = evaluation_settings(prepared, tokenizer)
    settings["eval_dataset"] = prepared.evaluation.select(range(min(EXAMPLES, len(prepared.evaluation))))
    start = _trained_values(model)
    middle, losses, before = arguments.learning_rate, {}, None
    for factor in FACTORS:
        arguments.learning_rate = float(f"{middle * factor:.1e}")
        _restore(model, start)
        trainer = SparseTrainer(model, arguments, train_dataset=prepared.train, objective=objective, **settings)
        if before is None:
            before = _loss(trainer)
        trainer.train()
        losses[arguments.learning_rate] = _loss(trainer)
        if trainer.is_world_process_zero():
            logger.warning("learning rate %g: loss %.4f", arguments.learning_rate, losses[arguments.learning_rate])
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise UserError("--find-rate: the loss is not finite with any of the rates; lower training.learning_rate")
    found = {
        "rates": [{"learning_rate": rate, "loss": finite.get(rate)} for rate in losses],
        "loss_before": before,
        "chosen": min(finite, key=finite.__getitem__),
        "steps": trainer.state.global_step,
        "device": device_name(),
    }
    if trainer.is_world_process_zero():
        output = Path(arguments.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / FILE).write_text(json_text(found) + "\n")
        print_rates(found, [path, *overrides])
    return found


def _without_deepspeed(recipe: Recipe, arguments: Any) -> Recipe:
    """The recipe with a few steps at a constant rate, and without what a run writes."""
    training = dict(recipe.training)
    model = recipe.model
    if training.pop("deepspeed", None):
        # DeepSpeed casts the model to half precision; the Trainer would cast in each operation
        half = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
        model = model.model_copy(update={"dtype": model.dtype or half})
        training |= {"bf16": False, "fp16": False}
    steps = arguments.max_steps if 0 < arguments.max_steps < STEPS else STEPS
    training |= {"max_steps": steps, "lr_scheduler_type": "constant", "warmup_steps": 0, "report_to": "none"}
    training |= {"learning_rate": arguments.learning_rate, "eval_on_start": False, "load_best_model_at_end": False}
    training |= {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    return recipe.model_copy(update={"training": training, "model": model})


def _trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters, and of the buffers, which training may change."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in (trained | dict(model.named_buffers())).items()}


def _restore(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    refresh(model)


def _loss(trainer: SparseTrainer) -> float:
    """The mean loss of the held-out examples, or of their tokens."""
    metrics = trainer.evaluate()
    return metrics.get("eval_token_loss", metrics.get("eval_example_loss"))
