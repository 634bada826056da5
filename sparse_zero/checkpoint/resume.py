"""Finds the checkpoint from which a run resumes, as --resume says. Imports torch only to open a checkpoint."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_zero.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sparse_zero.checkpoint.directory import Checkpoint
    from sparse_zero.recipe.recipe import Recipe

AUTO = "auto"

LEARNING_RATE, OPTIMIZER, DATA = RESETS = ("learning_rate", "optimizer", "data")
"""What a resumed run can take from its own settings instead of from the checkpoint.

learning_rate: the rate, at the checkpoint's place in the new schedule. optimizer: a new optimizer, without moments.
data: the training examples and the batch size, from the beginning of an epoch.
"""


def check_resets(names: Iterable[str]) -> list[str]:
    """Returns: the names, of which each is a member of RESETS. Raises UserError: one is not."""
    names = list(names)
    for name in names:
        if name not in RESETS:
            raise UserError(f"'{name}' is none of {', '.join(RESETS)}{did_you_mean(name, RESETS)}")
    return names


def split_resets(word: str) -> list[str]:
    """The names in the value of --reset, `learning_rate,data`. Raises argparse.ArgumentTypeError: one is not known."""
    try:
        return check_resets(name.strip() for name in word.split(","))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def complete_resume_option(argv: Sequence[str]) -> list[str]:
    """Replace a `--resume` that is not followed by a directory with `--resume=auto`: argparse would use the recipe or
    the override that follows as its value.
    """
    completed = list(argv)
    for index, word in enumerate(completed):
        following = completed[index + 1] if index + 1 < len(completed) else "-"
        if word == "--resume" and (following.startswith("-") or "=" in following or _is_recipe(following)):
            completed[index] = f"--resume={AUTO}"
    return completed


def _is_recipe(word: str) -> bool:
    if Path(word).exists():
        return Path(word).is_file()
    from sparse_zero.recipe import lookup, shipped

    return shipped.find(word, *lookup.SUFFIXES) is not None


def find_resume_checkpoint(recipe: "Recipe", requested: str | bool | None) -> "Checkpoint | None":
    """Find the checkpoint from which a run resumes.

    Args:
        recipe: of the run.
        requested: a checkpoint; a directory with checkpoints, of which the newest complete one is used; "auto" or True
            for the newest complete one in the recipe's own output directory, if there is one; False to start from the
            beginning; None for the recipe's training.resume_from_checkpoint, or False if the recipe does not set it.

    Returns: None to start from the beginning.

    Raises UserError: the requested checkpoint does not exist or is damaged; there are checkpoints, but none is
        complete; or a run that does not resume would overwrite the checkpoints or the results of an earlier run.
    """
    found = _find(recipe, requested)
    output = Path(str(recipe.training["output_dir"]))
    if found is None or not found.directory.resolve().is_relative_to(output.resolve()):
        _refuse_to_overwrite(output)
    return found


def _refuse_to_overwrite(output: Path) -> None:
    """Raises UserError: a run's directory has what an earlier run wrote when it ended."""
    for name in ("adapter", "model", "merged", "results.json"):
        path = output / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise UserError(
                f"training.output_dir: {output} contains {name} of an earlier run, which this one would overwrite: "
                f"use another training.output_dir or training.run_name, or remove {path}"
            )


def _find(recipe: "Recipe", requested: str | bool | None) -> "Checkpoint | None":
    from sparse_zero.checkpoint.directory import Checkpoint, newest_complete
    from sparse_zero.checkpoint.listing import list_checkpoints

    output = Path(str(recipe.training["output_dir"]))
    requested = recipe.training.get("resume_from_checkpoint") if requested is None else requested
    if requested in (None, False):
        older = list_checkpoints(output)
        if older:
            raise UserError(
                f"training.output_dir: {output} contains {older[-1].name} of an earlier run: resume it with --resume, "
                "use another training.output_dir, or remove the checkpoints"
            )
        return None
    if requested in (AUTO, True):
        found, problems = newest_complete(output)
        for problem in problems:
            print_once(f"skipped: {problem}")
        if found is None and problems:
            raise UserError(
                f"training.output_dir: none of the checkpoints in {output} can be used; to start from the beginning, "
                "remove them or use another training.output_dir"
            )
        if found is None:
            print_once(f"{output} contains no checkpoint: starting from the beginning")
    else:
        found, problems = newest_complete(Path(requested))
        if found is None:
            if problems:
                raise UserError(problems[0])
            found = Checkpoint(requested)
    if found is not None:
        print_once(f"resuming from {found.directory} (step {found.step}, saved on {found.manifest.world_size} ranks)")
    return found


def keep_batch_size(recipe: "Recipe", checkpoint: "Checkpoint | None") -> "Recipe":
    """The recipe, with the global batch size of the checkpoint's run for the current number of ranks.

    Raises UserError: the ranks cannot share that batch evenly.
    """
    if checkpoint is None:
        return recipe
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    size = recipe.training.get("per_device_train_batch_size", 8)
    micro_batches = recipe.training.get("gradient_accumulation_steps", 1)
    total = checkpoint.manifest.examples_per_step
    if size * micro_batches * ranks == total:
        return recipe
    shared = split_batch(total, ranks, size)
    if shared is None:
        raise UserError(
            f"{checkpoint.directory}: its steps have {total} examples, which {ranks} ranks cannot share evenly; "
            f"use a number of ranks that divides {total}"
        )
    size, micro_batches = shared
    print_once(f"keeping {total} examples per step: {size} x {micro_batches} micro-batches on each of {ranks} ranks")
    changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
    return recipe.model_copy(update={"training": recipe.training | changed})


def print_once(message: str) -> None:
    """Print one line on stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"sparse-zero: {message}", file=sys.stderr, flush=True)


def split_batch(total: int, world_size: int, max_size: int) -> tuple[int, int] | None:
    """Split a global batch evenly over the ranks.

    Args:
        total: examples in the global batch.
        world_size: number of ranks.
        max_size: the largest micro-batch of a rank, in examples, so that memory use does not grow.

    Returns:
        (size of a rank's micro-batch, number of micro-batches), with the largest possible micro-batch; None if the
        examples cannot be split evenly.
    """
    if total % world_size:
        return None
    per_rank = total // world_size
    size = max(size for size in range(1, min(max_size, per_rank) + 1) if per_rank % size == 0)
    return size, per_rank // size
