"""How a run quantises its base model: the recipe's `model.quantization` and what DeepSpeed does with the weights."""

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_zero.data.quantization import KEY, completed, from_transformers
from sparse_zero.errors import UserError
from sparse_zero.quantized.methods import own_quantization
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.recipe.recipe import Recipe


def quantization_of_run(
    recipe: Recipe, arguments: transformers.TrainingArguments, config: PreTrainedConfig, model: PreTrainedModel
) -> Quantization | None:
    """`model.quantization` with all its keys; None if the recipe has none.

    Args:
        config: the base model's.
        model: the base model before it is quantised; it may be on the meta device.

    Raises UserError: see `completed`; or the run cannot use a checkpoint that is quantised already.
    """
    section, own = recipe.model, own_quantization(config)
    given = section.quantization if own is None else from_transformers(own)
    if given is None:
        return None
    dtype = section.dtype or loading_dtype(recipe, arguments)
    loaded = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    partitioned = bool(arguments.deepspeed) and arguments.hf_deepspeed_config.is_zero3()
    try:
        found = completed(given, model, recipe.sparse, loaded, _cast_to(arguments), partitioned)
    except UserError as error:
        if own is None:
            raise
        problem = str(error).removeprefix(f"{KEY}.").removeprefix(f"{KEY}: ").partition(";")[0]
        raise UserError(
            f"model.name: {section.source} is quantised in a way that this run cannot use ({problem}): name the "
            f"checkpoint that is not quantised, and set {KEY}, or use another ZeRO stage or dtype"
        ) from None
    return found if own is None else None


def loading_dtype(recipe: Recipe, arguments: transformers.TrainingArguments) -> str:
    """The dtype in which a base model is loaded if the recipe names none.

    A quantised model is loaded in the dtype to which DeepSpeed converts it: an adapter names that one, and the base
    must be quantised from the same values again.
    """
    half = _cast_to(arguments)
    is_loaded = half == torch.bfloat16 or (half is not None and recipe.model.quantization is not None)
    return str(half).removeprefix("torch.") if is_loaded else "float32"


def _cast_to(arguments: transformers.TrainingArguments) -> torch.dtype | None:
    """The dtype to which DeepSpeed converts the model."""
    if not arguments.deepspeed:
        return None
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
