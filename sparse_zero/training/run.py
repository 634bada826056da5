"""What every rank runs: recipe -> data -> model -> trainer -> adapter and results."""

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
from sparse_zero.adapters.save_and_load import write_merged
from sparse_zero.checkpoint.directory import checkpoint_directory
from sparse_zero.checkpoint.output_lock import locked
from sparse_zero.checkpoint.resumption import find_resumption, with_its_batch
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.ranks.agreement import Ranks
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.selection.config import SparseConfig
from sparse_zero.training.build import build, evaluation_figures, evaluation_settings, training_arguments
from sparse_zero.training.report import print_results
from sparse_zero.training.trainer import Backward, Forward, Objective, SparseTrainer
from sparse_zero.zero.parameters import device_name, optimizer_bytes, peak_memory_bytes, stage_of


def keep_quiet(main: bool) -> None:
    """One progress bar and one warning for each host, not for each rank."""
    # DeepSpeed calls what torch has renamed; that is not the user's to correct.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not main:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        logging.getLogger("sparse_zero").setLevel(logging.ERROR)


def leave() -> None:
    """Part from the other ranks: threads of the process group that outlive Python may abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(
    recipe: Recipe,
    path: str,
    merge: bool = False,
    resume: str | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Run a recipe on this rank. Returns: what OUTPUT_DIR/results.json holds.

    Args: path: the recipe's file, named in the table's next command; merge: also write OUTPUT_DIR/merged; resume: see
        find_resumption; stop: what signals ask for.

    Raises UserError for everything in the recipe, the data, the model or a checkpoint that cannot be used. Raises
    Stopped: a signal asked for an end, and what there was is saved.
    """
    checkpoint = find_resumption(recipe, resume)
    recipe = with_its_batch(recipe, checkpoint)
    arguments = training_arguments(recipe)
    _check_noise(recipe.rpn)
    ranks = Ranks()
    with locked(Path(arguments.output_dir), ranks):
        directory = checkpoint.directory if checkpoint else None
        if directory and not directory.exists():
            # It was checkpoint-N.replaced, of a save that was cut; whoever locks the directory gives it its name back.
            directory = checkpoint_directory(directory.parent, checkpoint.step)
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
    tokenizer, prepared, model = build(recipe, arguments)
    sparsify(model, _with_tokens(recipe, tokenizer))
    sparsity = model.sparsity
    sparsity.base_model, sparsity.revision = recipe.model.name, recipe.model.revision
    sparsity.tokenizer, sparsity.new_tokens = recipe.model.tokenizer, recipe.model.new_tokens
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=prepared.train,
        stop=stop,
        objective=noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids),
        **evaluation_settings(recipe, prepared, tokenizer),
    )
    with stop.deferred() if stop else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate()
    output = Path(arguments.output_dir)
    results = _results(trainer, metrics)
    sparsity.results = {key: value for key, value in results.items() if not isinstance(value, list)}
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        results["adapter_bytes"] = adapter_bytes(output / "adapter")
        results["paths"] = {"adapter": str(output / "adapter"), "logs": str(output / "runs")}
        if merge:
            # At stage 3 from_pretrained would still partition the base among all ranks, and this one is alone here.
            unset_hf_deepspeed_config()
            write_merged(output / "adapter", output / "merged")
            results["paths"]["merged"] = str(output / "merged")
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print_results(results, path)
    return results


def _with_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> SparseConfig:
    """What to train, with the recipe's new tokens among the rows trained whole."""
    if not recipe.model.new_tokens:
        return recipe.sparse
    new = tokenizer.convert_tokens_to_ids(recipe.model.new_tokens)
    asked = recipe.sparse.trainable_token_indices or []
    return recipe.sparse.model_copy(update={"trainable_token_indices": sorted({*asked, *new})})


def noisy_objective(
    model: nn.Module, config: rpn.RPNConfig | None, arguments: TrainingArguments, special_token_ids: Iterable[int] = ()
) -> Objective | None:
    """A recipe's `rpn` section as a Trainer's objective; None where there is no such section."""
    if config is None:
        return None
    handle = rpn.attach(model, config, special_token_ids=special_token_ids)

    def objective(forward: Forward, backward: Backward, step: int, micro_step: int) -> torch.Tensor:
        handle.place(step=step, micro_step=micro_step, rank=arguments.process_index, world_size=arguments.world_size)
        losses = rpn.run_passes(handle, config, forward, backward)
        return losses["clean"] if "clean" in losses else losses["noisy"]

    return objective


def _results(trainer: SparseTrainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The run's figures. Collective: each rank tells its own memory."""
    history, now = trainer.state.log_history, trainer.state.log_history[trainer.log_entries_before :]
    before = evaluation_figures(next((e for e in history if "eval_loss" in e and e["step"] == 0), {}))
    after = evaluation_figures(metrics)
    runtime = next(entry["train_runtime"] for entry in reversed(now) if "train_runtime" in entry)
    # The Trainer counts evaluations during training as training; the last one came after it.
    evaluating = sum(entry["eval_runtime"] for entry in now if "eval_runtime" in entry) - metrics["eval_runtime"]
    sparsity = trainer.model.sparsity
    return {
        **{f"{key}_before": value for key, value in before.items()},
        **after,
        "trainable_parameters": sparsity.trainable_parameters,
        "total_parameters": sparsity.total_parameters,
        "world_size": trainer.args.world_size,
        "deepspeed": trainer.deepspeed is not None,
        "zero_stage": stage_of(trainer.deepspeed),
        "optimizer_bytes_per_rank": gather_object([optimizer_bytes(trainer.optimizer)]),
        "peak_memory_bytes_per_rank": gather_object([peak_memory_bytes()]),
        "train_seconds": round(runtime - evaluating, 3),
        "train_examples": len(trainer.train_dataset),
        "eval_examples": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "device": device_name(),
    }
