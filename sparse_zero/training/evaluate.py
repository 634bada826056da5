"""Evaluates an adapter on a recipe's evaluation examples, in one process."""

from pathlib import Path

from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.hub import adapter_directory
from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.recipe.objective import refuse_objective
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.build import build, evaluation_results, evaluation_settings, training_arguments
from sparse_zero.training.packing_check import check_packed_examples
from sparse_zero.training.trainer import SparseTrainer


def evaluate(recipe: Recipe, adapter: str | Path) -> dict[str, float]:
    """Evaluate an adapter on the evaluation examples of a recipe.

    Args:
        recipe: defines the base model, the data and the batch size.
        adapter: the adapter's directory, or a hub id.

    Returns: the metrics of the recipe's task: loss; accuracy, F1 and Matthews correlation, or perplexity.

    Raises UserError: see `build` and `load_adapter`.
    """
    refuse_objective(recipe.training, "evaluate")
    adapter = adapter_directory(adapter)
    # The settings of the loss only matter in training
    loss = {"chunked_loss": False, "use_liger_kernel": False}
    training = recipe.training | loss | {"deepspeed": None, "report_to": "none"}
    model_section = recipe.model
    if recipe.training.get("deepspeed"):
        # DeepSpeed casts the model to half precision; without DeepSpeed the Trainer would cast in each operation.
        training |= {"bf16": False, "fp16": False}
        model_section = model_section.model_copy(update={"dtype": read_config(adapter).dtype})
    recipe = recipe.model_copy(update={"training": training, "model": model_section})
    arguments = training_arguments(recipe)
    tokenizer, prepared, model, _ = build(recipe, arguments)
    load_adapter(model, adapter)
    trainer = SparseTrainer(model, arguments, **evaluation_settings(prepared, tokenizer))
    if recipe.data.packing:
        check_packed_examples(trainer, trainer.model)
    return evaluation_results(trainer.evaluate())
