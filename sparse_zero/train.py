"""What every rank runs: recipe -> data -> model -> trainer -> adapter and results.

deepspeed --num_gpus 2 --module sparse_zero.train configs/demo.yaml training.learning_rate=1e-3
torchrun --nproc-per-node 2 -m sparse_zero.train configs/demo.yaml
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

import rpn
from sparse_zero.adapter import write_merged
from sparse_zero.adapter_files import adapter_bytes
from sparse_zero.build import build, evaluation_figures, evaluation_settings, training_arguments
from sparse_zero.errors import UserError
from sparse_zero.model import sparsify
from sparse_zero.recipe import Recipe, load_recipe
from sparse_zero.report import print_results
from sparse_zero.trainer import Backward, Forward, Objective, SparseTrainer
from sparse_zero.zero import device_name, optimizer_bytes, peak_memory_bytes, stage_of


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for what the user has to correct."""
    parser = argparse.ArgumentParser(prog="python -m sparse_zero.train", description="One rank of a training run.")
    parser.add_argument("recipe", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the recipe")
    parser.add_argument("--merge", action="store_true", help="also write the merged model, as OUTPUT_DIR/merged")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args(argv)
    _keep_quiet(main=os.environ.get("LOCAL_RANK", "0") == "0")
    try:
        train(load_recipe(options.recipe, options.overrides), options.recipe, merge=options.merge)
    except UserError as error:
        # Every rank of a host meets the same error: one of them says so.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"sparse-zero: error: {error}", file=sys.stderr)
        return 2
    return 0


def _keep_quiet(main: bool) -> None:
    """One progress bar and one warning for each host, not for each rank."""
    # DeepSpeed calls what torch has renamed; that is not the user's to correct.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not main:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        logging.getLogger("sparse_zero").setLevel(logging.ERROR)


def train(recipe: Recipe, path: str, merge: bool = False) -> dict[str, Any]:
    """Run a recipe on this rank. Returns: what OUTPUT_DIR/results.json holds.

    Args: path: the recipe's file, named in the table's next command; merge: also write OUTPUT_DIR/merged.

    Raises UserError for everything in the recipe, the data or the model that cannot be used.
    """
    arguments = training_arguments(recipe)
    set_seed(arguments.seed)
    tokenizer, prepared, model = build(recipe, arguments)
    sparsify(model, recipe.sparse)
    model.sparsity.base_model, model.sparsity.revision = recipe.model.name, recipe.model.revision
    model.sparsity.tokenizer = recipe.model.tokenizer
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=prepared.train,
        objective=noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids),
        **evaluation_settings(recipe, prepared, tokenizer),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    output = Path(arguments.output_dir)
    trainer.save_model(str(output / "adapter"))
    results = _results(trainer, metrics)
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
    history = trainer.state.log_history
    before = evaluation_figures(next((e for e in history if "eval_loss" in e and e["step"] == 0), {}))
    after = evaluation_figures(metrics)
    runtime = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    # The Trainer counts evaluations during training as training; the last one came after it.
    evaluating = sum(entry["eval_runtime"] for entry in history if "eval_runtime" in entry) - metrics["eval_runtime"]
    sparsity = trainer.model.sparsity
    return {
        **{f"{key}_before": value for key, value in before.items()},
        **after,
        "trainable_parameters": sparsity.trainable_parameters,
        "total_parameters": sparsity.total_parameters,
        "world_size": trainer.args.world_size,
        "zero_stage": stage_of(trainer.deepspeed),
        "optimizer_bytes_per_rank": gather_object([optimizer_bytes(trainer.optimizer)]),
        "peak_memory_bytes_per_rank": gather_object([peak_memory_bytes()]),
        "train_seconds": round(runtime - evaluating, 3),
        "train_examples": len(trainer.train_dataset),
        "eval_examples": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "device": device_name(),
    }


if __name__ == "__main__":
    sys.exit(main())
