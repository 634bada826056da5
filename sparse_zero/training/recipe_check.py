"""Checks a recipe's settings before data or weights are loaded, by asking the libraries that will read them.

    arguments = training_arguments(recipe)
    check_recipe(recipe, arguments)

Only the configuration of the base model is read, and the model is built on the meta device.
"""

import inspect
from typing import Any

import torch
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, SchedulerType, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sparse_zero.data.datasets import check_augment
from sparse_zero.data.files import check_path
from sparse_zero.data.metrics import METRICS
from sparse_zero.data.models import load_config, meta_model
from sparse_zero.data.quantization import check_trainable
from sparse_zero.errors import UserError, did_you_mean, first_line
from sparse_zero.recipe.method import is_plain
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import find_modules_to_save
from sparse_zero.training.loss_options import check_loss_settings
from sparse_zero.training.plain_methods import apply_method
from sparse_zero.training.quantized_base import quantization_of_run
from sparse_zero.training.rewards import load_rewards
from sparse_zero.training.trackers import check_imports
from sparse_zero.zero.loading import not_partitioned

_SEEDS = range(2**32)
"""The seeds that NumPy takes."""

_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
}

_DEEPSPEED_KEYS = {
    *(value for value in vars(constants).values() if isinstance(value, str)),
    *("zero_optimization", "bf16", "fp16", "activation_checkpointing", "flops_profiler", "comms_logger", "data_types"),
}
"""The keys of a DeepSpeed file, and other strings. DeepSpeed itself ignores a key that it does not know."""

_TIMES = ("runtime", "samples_per_second", "steps_per_second")


def check_recipe(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raise UserError for the first setting that would end the run later.

    Args:
        recipe: the recipe.
        arguments: made of its `training` section.
    """
    check_settings(recipe, arguments)
    check_path(recipe.data)
    check_augment(recipe.data)
    load_rewards(recipe)
    check_model(recipe, load_model_config(recipe), arguments)


def check_settings(recipe: Recipe, arguments: TrainingArguments) -> None:
    """As `check_recipe`, but without what another machine may have: the data files and the model's configuration."""
    _check_numbers(arguments)
    check_loss_settings(arguments)
    _check_other_settings(arguments)
    _check_trackers(arguments)
    if recipe.training.get("objective") is None:
        _check_metric(arguments, recipe.model.task)
    _check_deepspeed(arguments)
    _check_optimizer(arguments)


def load_model_config(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of a recipe's base model. Raises UserError: see `load_config`."""
    section = recipe.model
    return load_config(section.source, section.revision, trust_remote_code=section.trust_remote_code)


def check_model(recipe: Recipe, config: PreTrainedConfig, arguments: TrainingArguments) -> None:
    """Raise UserError if the base model cannot be loaded with these settings, or has no such targets."""
    section = recipe.model
    with not_partitioned():
        check_trainable(section.source, config, section.quantization)
        model = meta_model(config, section.task, torch.float32, section.trust_remote_code)
        quantization_of_run(recipe, arguments, config, model)
        if section.attn_implementation is not None:
            _check_attention(model, section.attn_implementation)
        if is_plain(recipe.training):
            apply_method(model, recipe)
            return
        # Neither values nor the rows of new tokens are known yet. The budget is the same for every way to select.
        sparse = recipe.sparse.model_copy(update={"selection": "stratified", "trainable_token_indices": None})
        select_scalars(model, sparse, find_modules_to_save(model, sparse))


def _check_numbers(arguments: TrainingArguments) -> None:
    for key, least in _LEAST.items():
        value = getattr(arguments, key)
        if not value >= least:
            raise UserError(f"training.{key}: {value:g}: must be at least {least}")
    for kind in ("eval", "save", "logging"):
        steps = getattr(arguments, f"{kind}_steps")
        if getattr(arguments, f"{kind}_strategy") == "steps" and not steps > 0:
            raise UserError(
                f"training.{kind}_steps: {steps:g}: must be above 0; training.{kind}_strategy: no turns it off"
            )
    for key in ("seed", "data_seed"):
        value = getattr(arguments, key)
        if value is not None and value not in _SEEDS:
            raise UserError(f"training.{key}: {value}: a seed is at least 0 and below 2**32")


def _check_other_settings(arguments: TrainingArguments) -> None:
    if arguments.fsdp:
        raise UserError("training.fsdp: DeepSpeed partitions sparse models: set training.deepspeed: zero3.json")
    if arguments.resume_from_checkpoint:
        raise UserError("training.resume_from_checkpoint: pass it on the command line: --resume DIR")
    known = inspect.signature(checkpoint).parameters
    for key in arguments.gradient_checkpointing_kwargs or {}:
        if key not in known:
            raise UserError(f"training.gradient_checkpointing_kwargs: unknown key '{key}'{did_you_mean(key, known)}")
    backends = torch._dynamo.list_backends(exclude_tags=())
    if arguments.torch_compile and arguments.torch_compile_backend not in backends:
        raise UserError(
            f"training.torch_compile_backend: no backend '{arguments.torch_compile_backend}'; known: "
            f"{', '.join(backends)}"
        )


def _check_trackers(arguments: TrainingArguments) -> None:
    others = [name for name in arguments.report_to if name != "tensorboard"]  # which this package depends on
    # It imports wandb if that is installed, whatever `report_to` says
    available = get_available_reporting_integrations() if others else []
    for name in others:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK) or f"; known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise UserError(f"training.report_to: unknown tracker '{name}'{hint}")
        if name not in available:
            raise UserError(
                f"training.report_to: the package of '{name}' is not installed; install it, or leave it out"
            )
    check_imports(arguments.report_to)


def _check_metric(arguments: TrainingArguments, task: str) -> None:
    if arguments.batch_eval_metrics:
        raise UserError("training.batch_eval_metrics: the metrics need all examples at once; leave it out")
    name = arguments.metric_for_best_model
    if name is None:
        return
    known = ["loss", *_TIMES]
    if task == "causal-lm":
        known += ["token_loss", "perplexity"]
    else:
        known += ["example_loss", *(metric for metric in METRICS if metric != "perplexity")]
    if name.removeprefix("eval_") not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"training.metric_for_best_model: no metric '{name}'{hint}; known: {', '.join(known)}")


def _check_deepspeed(arguments: TrainingArguments) -> None:
    if not arguments.deepspeed:
        return
    config = arguments.hf_deepspeed_config
    # The number of ranks is known to the ranks only
    mismatches = [text for text in config.mismatches if torch.distributed.is_initialized() or "calculated" not in text]
    if mismatches:
        stated = "; ".join(text.removeprefix("- ds ").replace("hf ", "training.") for text in mismatches)
        raise UserError(f'training.deepspeed: differs from the recipe: {stated}; write "auto" in the DeepSpeed file')
    for key in config.config:
        if key not in _DEEPSPEED_KEYS and (meant := did_you_mean(key, _DEEPSPEED_KEYS)):
            raise UserError(f"training.deepspeed: DeepSpeed has no key '{key}'{meant}")
    zero = {key: value for key, value in (config.get_value("zero_optimization") or {}).items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValueError, TypeError) as error:
        problem = error.errors()[-1] if hasattr(error, "errors") else {"loc": (), "msg": first_line(error)}
        key = ".".join(["zero_optimization", *map(str, problem["loc"])])
        if key == "zero_optimization.stage":
            problem = {"msg": f"{zero['stage']!r}: must be 0, 1, 2 or 3"}
        raise UserError(f"training.deepspeed: {key}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from error


def _check_optimizer(arguments: TrainingArguments) -> None:
    config = arguments.hf_deepspeed_config if arguments.deepspeed else None
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([parameter], lr=arguments.learning_rate)
    if config is None or config.get_value("optimizer") is None:
        _trying("training.optim", lambda: Trainer.get_optimizer_cls_and_kwargs(arguments))
    if config is None or config.get_value("scheduler") is None:
        kind, steps, more = SchedulerType(arguments.lr_scheduler_type), 100, arguments.lr_scheduler_kwargs
        _trying(
            f"training.lr_scheduler_type: {kind.value}",
            lambda: get_scheduler(
                kind, optimizer, arguments.get_warmup_steps(steps), steps, scheduler_specific_kwargs=more
            ),
        )


def _check_attention(model: PreTrainedModel, implementation: str) -> None:
    _trying(
        f"model.attn_implementation: {implementation}",
        lambda: model._check_and_adjust_attn_implementation(implementation, is_init_check=True),
    )


def _trying(what: str, call: Any) -> None:
    """Call a library's own check. Any error of it is the user's, with `what` before it."""
    try:
        call()
    except Exception as error:  # libraries raise ValueError, ImportError, KeyError, AssertionError, ...
        raise UserError(f"{what}: {first_line(error)}") from error
