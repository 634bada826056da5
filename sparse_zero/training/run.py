"""The training run that every rank executes: recipe, data, model, trainer, adapter and results."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
from sparse_zero.adapters.merging import write_merged
from sparse_zero.checkpoint.directory import Checkpoint, newest_complete
from sparse_zero.checkpoint.output_lock import locked
from sparse_zero.checkpoint.resume import DATA, find_resume_checkpoint, keep_batch_size, print_once
from sparse_zero.errors import UserError, disk_problem
from sparse_zero.json_text import json_text
from sparse_zero.model.sparsify import sparsify_chosen
from sparse_zero.model.wrappers import unwrap
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.ranks.compilations import announce_compilations
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.recipe.method import is_plain, refuse_merge
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.training import check_training
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.selector import Choose
from sparse_zero.training.build import build, evaluation_settings, training_arguments
from sparse_zero.training.device import device_name, peak_memory_bytes
from sparse_zero.training.further_evaluation import LossBeforeTraining, further_results
from sparse_zero.training.packing_check import PackingCheck
from sparse_zero.training.plain_methods import apply_method
from sparse_zero.training.plain_results import merge_low_rank
from sparse_zero.training.plain_trainer import PlainTrainer
from sparse_zero.training.recipe_check import check_recipe
from sparse_zero.training.results_table import print_results
from sparse_zero.training.run_settings import describe_examples, sections_of
from sparse_zero.training.selection_examples import choose_by_examples
from sparse_zero.training.trainer import Backward, Forward, Objective, SparseTrainer
from sparse_zero.zero.parameters import optimizer_bytes, zero_stage

MakeTrainer = Callable[[Recipe, TrainingArguments, StopRequest | None], SparseTrainer]
"""Makes the trainer of a recipe."""


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
    reset: Collection[str] = (),
    make: MakeTrainer | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a recipe on this rank. A collective call.

    Args:
        recipe: the recipe.
        path: the recipe's file, for the next command in the printed table.
        merge: also write OUTPUT_DIR/merged.
        resume: see `find_resume_checkpoint`.
        stop: set by signals.
        reset: what a resumed run takes from the recipe, see `checkpoint.resume.RESETS`.
        make: makes the trainer; None: `build_trainer`, which is for recipes without an objective.
        overrides: with which the recipe was loaded, also for the next command.

    Returns: the content of OUTPUT_DIR/results.json.

    Raises UserError: the recipe, the data, the model or a checkpoint is not valid.
    Raises Stopped: a signal arrived, and a checkpoint has been saved.
    """
    check_training(recipe.training)
    refuse_merge(recipe.training, merge)
    ranks = Ranks()
    with locked(Path(str(recipe.training["output_dir"])), ranks):
        checkpoint = ranks.on_first(lambda: find_resume_checkpoint(recipe, resume))
        if DATA not in reset:
            recipe = keep_batch_size(recipe, checkpoint)
        arguments = training_arguments(recipe)
        check_recipe(recipe, arguments)
        _check_noise(recipe.rpn)
        _say_if_noise_changes(recipe.rpn, checkpoint, ranks.world_size)
        make = make or functools.partial(build_trainer, checkpoint=checkpoint)
        return _train(recipe, [path, *overrides], merge, arguments, checkpoint, stop, reset, make)


def _check_noise(config: rpn.RPNConfig | None) -> None:
    """Load the user's noise function before the model, which takes longer.

    Raises UserError: there is no such function.
    """
    if config is not None and ":" in config.noise:
        try:
            load_noise(config.noise)
        except NoiseNotFound as error:
            raise UserError(f"rpn.noise: {error}") from None


def _say_if_noise_changes(config: rpn.RPNConfig | None, checkpoint: Checkpoint | None, ranks: int) -> None:
    """Say it, once, if the rest of a resumed run has another noise than it would have had."""
    if config is None or checkpoint is None or checkpoint.manifest.world_size == ranks:
        return
    if config.scope == "batch" and config.noise != "none" and config.passes > 0:
        print_once(
            f"the noise is not what it would have been on {checkpoint.manifest.world_size} ranks: with rpn.scope: "
            "batch it depends on the number of ranks (with rpn.scope: sequence it would not)"
        )


def _train(
    recipe: Recipe,
    words: Sequence[str],
    merge: bool,
    arguments: TrainingArguments,
    checkpoint: Checkpoint | None,
    stop: StopRequest | None,
    reset: Collection[str],
    make: MakeTrainer,
) -> dict[str, Any]:
    set_seed(arguments.seed)
    trainer = make(recipe, arguments, stop)
    # Until the adapter and the results are written. A stop request after the training does not lose them.
    with stop.deferred() if stop else contextlib.nullcontext():
        return _run(trainer, recipe, words, merge, checkpoint, reset)


def build_trainer(
    recipe: Recipe, arguments: TrainingArguments, stop: StopRequest | None, checkpoint: Checkpoint | None = None
) -> SparseTrainer:
    """The trainer of a recipe without an objective. A collective call.

    Args:
        recipe: the recipe.
        arguments: made of its `training` section.
        stop: set by signals.
        checkpoint: from which the run resumes.

    Raises UserError: see `build`.
    """
    tokenizer, prepared, model, new_tokens, further = build(recipe, arguments)
    given: dict[str, Any] = {
        "args": arguments,
        "train_dataset": prepared.train,
        "stop": stop,
        "settings": sections_of(recipe) | {"examples": describe_examples(prepared.train)},
        **evaluation_settings(prepared, tokenizer),
    }
    if is_plain(recipe.training):
        trained = apply_method(model, recipe, tokenizer, new_tokens, arguments.seed)
        given["settings"] |= {"method": {"name": trained.method}}
        noise = noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids)
        trainer: SparseTrainer = PlainTrainer(trained, objective=noise, **given)
    else:
        choose = choose_by_examples(model, recipe.sparse, prepared, arguments, checkpoint)
        make_sparse(model, recipe, tokenizer, new_tokens, choose)
        noise = noisy_objective(model, recipe.rpn, arguments, tokenizer.all_special_ids)
        trainer = SparseTrainer(model, objective=noise, **given)
    if recipe.data.packing:
        trainer.add_callback(PackingCheck(trainer))
    trainer.further = further
    if further.text is not None:
        trainer.add_callback(LossBeforeTraining(trainer, further.text))
    return trainer


def make_sparse(
    model: nn.Module,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[str],
    choose: Choose | None = None,
) -> None:
    """Make a recipe's model sparse, in place, and note where it comes from."""
    sparsify_chosen(model, config_with_tokens(recipe.sparse, new_tokens, tokenizer), choose=choose)
    sparsity = model.sparsity
    sparsity.base_model, sparsity.revision = recipe.model.source, recipe.model.revision
    sparsity.tokenizer, sparsity.new_tokens = recipe.model.tokenizer, new_tokens


def _run(
    trainer: SparseTrainer,
    recipe: Recipe,
    words: Sequence[str],
    merge: bool,
    checkpoint: Checkpoint | None,
    reset: Collection[str],
) -> dict[str, Any]:
    """Train, evaluate and write the adapter or the model, and the results."""
    trainer.train(resume_from_checkpoint=checkpoint.directory if checkpoint else None, reset=reset)
    metrics = trainer.evaluate()
    output = Path(trainer.args.output_dir)
    results = _results(trainer, metrics) | further_results(trainer, trainer.further)
    facts = {key: value for key, value in results.items() if not isinstance(value, list | dict)}
    if is_hub_id(recipe.data.path):
        facts["dataset"] = recipe.data.path
    with _one_sentence_if_not_written(output):
        paths = trainer.save_result(output, facts)
        if trainer.is_world_process_zero():
            ((kind, place),) = paths.items()
            results[f"{kind}_bytes"] = adapter_bytes(place) if kind == "adapter" else directory_bytes(place)
            results["paths"] = {**paths, "logs": str(output / "runs")}
            try:
                if merge:
                    # At stage 3 from_pretrained would still partition the model, but only this rank loads it
                    unset_hf_deepspeed_config()
                    _merge(trainer, recipe, place, output / "merged")
                    results["paths"]["merged"] = str(output / "merged")
            finally:
                # Also if the merge fails: the training is done
                print_results(results, words)
                _write_results(output / "results.json", results)
    return results


def _merge(trainer: SparseTrainer, recipe: Recipe, adapter: str, merged: Path) -> None:
    if is_plain(recipe.training):
        merge_low_rank(recipe, unwrap(trainer.model).config, trainer.processing_class, adapter, merged)
    else:
        write_merged(Path(adapter), merged, trust_remote_code=recipe.model.trust_remote_code)


def directory_bytes(directory: str | Path) -> int:
    """The size of all files in a directory."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def _write_results(path: Path, results: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(json_text(results) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


@contextlib.contextmanager
def _one_sentence_if_not_written(output: Path) -> Iterator[None]:
    """Raises UserError for what the block could not write, and says how to end the run."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        problem = disk_problem(cause)
        if problem is None:
            raise
        place = getattr(cause, "filename", None) or output
        saved, _ = newest_complete(output)
        remedy = f"resume with --resume, from {saved.directory.name}, to write it" if saved else "train again"
        raise UserError(
            f"{place}: cannot be written ({problem}): the training is done, but not all of its results are on the "
            f"disk; make room, and {remedy}"
        ) from None


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
    history = trainer.state.log_history
    before = trainer.evaluation_results(next((e for e in history if "eval_loss" in e and e["step"] == 0), {}))
    after = trainer.evaluation_results(metrics)
    seconds, tokens = trainer.trained_so_far()
    seconds = round(seconds, 3)
    trained, total = trainer.count_parameters()
    return {
        **{f"{key}_before": value for key, value in before.items()},
        **after,
        **trainer.method_facts(),
        "trainable_parameters": trained,
        "total_parameters": total,
        "world_size": trainer.args.world_size,
        "deepspeed": trainer.deepspeed is not None,
        "zero_stage": zero_stage(trainer.deepspeed),
        "optimizer_bytes_per_rank": gather_object([optimizer_bytes(trainer.optimizer)]),
        "peak_memory_bytes_per_rank": gather_object([peak_memory_bytes()]),
        "checkpoint_bytes": trainer.checkpoint_bytes(),
        "train_seconds": seconds,
        "train_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds > 0 else None,
        "train_examples": len(trainer.train_dataset),
        "eval_examples": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "device": device_name(),
    }
