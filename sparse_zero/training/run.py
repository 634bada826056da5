"""The training run that every rank executes: recipe, data, model, trainer, adapter and results."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

import rpn
from rpn.user_noise import NoiseNotFound, load_noise
from sparse_zero.adapters.files import adapter_bytes
from sparse_zero.adapters.hub import is_hub_id
from sparse_zero.adapters.save_and_load import write_merged
from sparse_zero.checkpoint.directory import checkpoint_path
from sparse_zero.checkpoint.output_lock import locked
from sparse_zero.checkpoint.resume import find_resume_checkpoint, keep_batch_size
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.ranks.compilations import announce_compilations
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.selection.config import SparseConfig
from sparse_zero.training.build import build, evaluation_results, evaluation_settings, training_arguments
from sparse_zero.training.device import device_name, peak_memory_bytes
from sparse_zero.training.packing_check import PackingCheck
from sparse_zero.training.recipe_check import check_recipe
from sparse_zero.training.results_table import print_results
from sparse_zero.training.trainer import Backward, Forward, Objective, SparseTrainer
from sparse_zero.zero.parameters import optimizer_bytes, zero_stage


def limit_output(is_first_of_host: bool) -> None:
    """Show progress bars and warnings once per host, not once per rank."""
    # DeepSpeed calls functions that torch has renamed; the user cannot correct that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if is_first_of_host:
        announce_compilations()
    else:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        logging.getLogger("sparse_zero").setLevel(logging.ERROR)


def destroy_process_group() -> None:
    """Destroy the process group, if there is one: its threads may abort the process if they outlive Python."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(
    recipe: Recipe,
    path: str,
    merge: bool = False,
    resume: str | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Run a recipe on this rank. A collective call.

    Args:
        recipe: the recipe.
        path: the recipe's file, for the next command in the printed table.
        merge: also write OUTPUT_DIR/merged.
        resume: see `find_resume_checkpoint`.
        stop: set by signals.

    Returns: the content of OUTPUT_DIR/results.json.

    Raises UserError: the recipe, the data, the model or a checkpoint is not valid.
    Raises Stopped: a signal arrived, and a checkpoint has been saved.
    """
    checkpoint = find_resume_checkpoint(recipe, resume)
    recipe = keep_batch_size(recipe, checkpoint)
    arguments = training_arguments(recipe)
    check_recipe(recipe, arguments)
    _check_noise(recipe.rpn)
    ranks = Ranks()
    with locked(Path(arguments.output_dir), ranks):
        directory = checkpoint.directory if checkpoint else None
        if directory and not directory.exists():
            # It was checkpoint-N.replaced, from an interrupted save. `locked` has renamed it to checkpoint-N.
            directory = checkpoint_path(directory.parent, checkpoint.step)
        return _train(recipe, path, merge, arguments, directory, stop)


def _check_noise(config: rpn.RPNConfig | None) -> None:
    """Load the user's noise function before the model, which takes longer.

    Raises UserError: there is no such function.
    """
    if config is not None and ":" in config.noise:
        try:
            load_noise(config.noise)
        except NoiseNotFound as error:
            raise UserError(f"rpn.noise: {error}") from None


def _train(
    recipe: Recipe,
    path: str,
    merge: bool,
    arguments: TrainingArguments,
    checkpoint: Path | None,
    stop: StopRequest | None,
) -> dict[str, Any]:
    set_seed(arguments.seed)
    tokenizer, prepared, model, new_tokens = build(recipe, arguments)
    sparsify(model, config_with_tokens(recipe.sparse, new_tokens, tokenizer))
    sparsity = model.sparsity
    sparsity.base_model, sparsity.revision = recipe.model.source, recipe.model.revision
    sparsity.tokenizer, sparsity.new_tokens = recipe.model.tokenizer, new_tokens
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=prepared.train,
        stop=stop,
        objective=noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids),
        **evaluation_settings(prepared, tokenizer),
    )
    if recipe.data.packing:
        trainer.add_callback(PackingCheck(trainer))
    with stop.deferred() if stop else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate()
    output = Path(arguments.output_dir)
    results = _results(trainer, metrics)
    sparsity.results = {key: value for key, value in results.items() if not isinstance(value, list)}
    if is_hub_id(recipe.data.path):
        sparsity.results["dataset"] = recipe.data.path
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        results["adapter_bytes"] = adapter_bytes(output / "adapter")
        results["paths"] = {"adapter": str(output / "adapter"), "logs": str(output / "runs")}
        try:
            if merge:
                # At stage 3 from_pretrained would still partition the model over all ranks, but only this rank loads
                unset_hf_deepspeed_config()
                write_merged(output / "adapter", output / "merged", trust_remote_code=recipe.model.trust_remote_code)
                results["paths"]["merged"] = str(output / "merged")
        finally:
            # Also if the merge fails: the training is done
            (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            print_results(results, path)
    return results


def config_with_tokens(
    config: SparseConfig, new_tokens: list[str], tokenizer: PreTrainedTokenizerBase
) -> SparseConfig:
    """The recipe's `sparse` section, with the new tokens added to trainable_token_indices."""
    if not new_tokens:
        return config
    new = tokenizer.convert_tokens_to_ids(new_tokens)
    given = config.trainable_token_indices or []
    return config.model_copy(update={"trainable_token_indices": sorted({*given, *new})})


def noisy_objective(
    model: nn.Module, config: rpn.RPNConfig | None, arguments: TrainingArguments, special_token_ids: Iterable[int] = ()
) -> Objective | None:
    """Attach Random Position Noise to a model, and make the objective of a SparseTrainer.

    Args:
        model: gets the noise.
        config: the recipe's `rpn` section; None: no noise.
        arguments: of the Trainer.
        special_token_ids: tokens that get no noise.

    Returns: the objective; None if `config` is None.
    """
    if config is None:
        return None
    handle = rpn.attach(model, config, special_token_ids=special_token_ids)

    def objective(forward: Forward, backward: Backward, step: int, micro_step: int) -> torch.Tensor:
        handle.place(step=step, micro_step=micro_step, rank=arguments.process_index, world_size=arguments.world_size)
        losses = rpn.run_passes(handle, config, forward, backward)
        return losses["clean"] if "clean" in losses else losses["noisy"]

    return objective


def _results(trainer: SparseTrainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The results of the run. A collective call, because the results contain the memory of every rank."""
    history, now = trainer.state.log_history, trainer.state.log_history[trainer.log_entries_before :]
    before = evaluation_results(next((e for e in history if "eval_loss" in e and e["step"] == 0), {}))
    after = evaluation_results(metrics)
    runtime = next(entry["train_runtime"] for entry in reversed(now) if "train_runtime" in entry)
    # The Trainer's runtime includes evaluations during training, but not the last one, which followed it.
    evaluating = sum(entry["eval_runtime"] for entry in now if "eval_runtime" in entry) - metrics["eval_runtime"]
    sparsity = trainer.model.sparsity
    return {
        **{f"{key}_before": value for key, value in before.items()},
        **after,
        "trainable_parameters": sparsity.trainable_parameters,
        "total_parameters": sparsity.total_parameters,
        "world_size": trainer.args.world_size,
        "deepspeed": trainer.deepspeed is not None,
        "zero_stage": zero_stage(trainer.deepspeed),
        "optimizer_bytes_per_rank": gather_object([optimizer_bytes(trainer.optimizer)]),
        "peak_memory_bytes_per_rank": gather_object([peak_memory_bytes()]),
        "train_seconds": round(runtime - evaluating, 3),
        "train_examples": len(trainer.train_dataset),
        "eval_examples": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "device": device_name(),
    }
