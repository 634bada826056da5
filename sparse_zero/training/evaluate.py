"""Evaluates an adapter on a recipe's evaluation examples, in one process."""

from pathlib import Path

from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.hub import adapter_directory
from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.recipe.method import is_plain
from sparse_zero.recipe.objective import refuse_objective
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.training.build import build, evaluation_results, evaluation_settings, training_arguments
from sparse_zero.training.packing_check import check_packed_examples
from sparse_zero.training.plain_results import method_of_result, open_trained, trained_section
from sparse_zero.training.plain_trainer import PlainTrainer
from sparse_zero.training.trainer import SparseTrainer


def evaluate(recipe: Recipe, adapter: str | Path) -> dict[str, float]:
    """Evaluate an adapter on the evaluation examples of a recipe.

    Args:
        recipe: defines the base model, the data and the batch size.
        adapter: the adapter's directory, or a hub id; also an adapter of PEFT's LoRA, or a model's directory, as the
            other methods write them, whatever the recipe's method.

    Returns: the metrics of the recipe's task: loss; accuracy, F1 and Matthews correlation, or perplexity.

    Raises UserError: see `build` and `load_adapter`.
    """
    refuse_objective(recipe.training, "evaluate")
    adapter = adapter_directory(adapter)
    method = {"method": method_of_result(recipe, adapter)}
    recipe = recipe.model_copy(update={"training": recipe.training | method})
    # The settings of the loss only matter in training
    loss = {"chunked_loss": False, "use_liger_kernel": False}
    training = recipe.training | loss | {"deepspeed": None, "report_to": "none"}
    model_section = recipe.model
    if recipe.training.get("deepspeed"):
        # DeepSpeed casts the model to half precision; without DeepSpeed the Trainer would cast in each operation.
        training |= {"bf16": False, "fp16": False}
    plain = is_plain(recipe.training)
    if plain:
        model_section = trained_section(recipe, adapter)
    elif recipe.training.get("deepspeed"):
        model_section = model_section.model_copy(update={"dtype": read_config(adapter).dtype})
    recipe = recipe.model_copy(update={"training": training, "model": model_section})
    arguments = training_arguments(recipe)
    tokenizer, prepared, model, _, _ = build(recipe, arguments)
    settings = evaluation_settings(prepared, tokenizer) | {"args": arguments}
    if plain:
        trainer: SparseTrainer = PlainTrainer(open_trained(recipe, model, adapter), **settings)
    else:
        load_adapter(model, adapter)
        trainer = SparseTrainer(model, **settings)
    if recipe.data.packing:
        check_packed_examples(trainer, trainer.model)
    return evaluation_results(trainer.evaluate())
