"""From what is asked with --resume to the checkpoint that a run goes on from. Imports torch only where it looks."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_zero.errors import UserError
from sparse_zero.zero.resharding import share_batch

if TYPE_CHECKING:
    from sparse_zero.checkpoint.directory import Checkpoint
    from sparse_zero.recipe.recipe import Recipe

AUTO = "auto"


def settle_resume(argv: Sequence[str]) -> list[str]:
    """`--resume` takes a directory or none; argparse would give it the recipe or the override that follows."""
    settled = list(argv)
    for index, word in enumerate(settled):
        following = settled[index + 1] if index + 1 < len(settled) else "-"
        if word == "--resume" and (following.startswith("-") or "=" in following or _is_recipe(following)):
            settled[index] = f"--resume={AUTO}"
    return settled


def _is_recipe(word: str) -> bool:
    if Path(word).exists():
        return Path(word).is_file()
    from sparse_zero.recipe import lookup, shipped

    return shipped.find(word, *lookup.SUFFIXES) is not None


def find_resumption(recipe: "Recipe", asked: str | bool | None) -> "Checkpoint | None":
    """Args: asked: a checkpoint, a directory that holds some, "auto" (the newest complete one of the recipe's own
    directory, should there be one), or None (the recipe's training.resume_from_checkpoint, which else means no).

    Raises UserError: no complete checkpoint there, or a damaged one; a fresh start over an older run's checkpoints.
    """
    from sparse_zero.checkpoint.directory import Checkpoint, newest_complete, numbered

    output = Path(str(recipe.training["output_dir"]))
    asked = recipe.training.get("resume_from_checkpoint") if asked is None else asked
    if asked in (None, False):
        older = numbered(output)
        if older:
            raise UserError(
                f"training.output_dir: {output} holds {older[-1].name} of an earlier run: go on from it with "
                "--resume, or give another training.output_dir, or remove the checkpoints"
            )
        return None
    if asked in (AUTO, True):
        found, problems = newest_complete(output)
        for problem in problems:
            say(f"passed over: {problem}")
        if found is None and problems:
            raise UserError(
                f"training.output_dir: none of the checkpoints in {output} can be used; to start afresh, remove them "
                "or give another training.output_dir"
            )
        if found is None:
            say(f"{output} holds no checkpoint: starting afresh")
    else:
        found, problems = newest_complete(Path(asked))
        if found is None:
            if problems:
                raise UserError(problems[0])
            found = Checkpoint(asked)
    if found is not None:
        say(f"resuming from {found.directory} (step {found.step}, saved on {found.manifest.world_size} ranks)")
    return found


def with_its_batch(recipe: "Recipe", checkpoint: "Checkpoint | None") -> "Recipe":
    """The recipe with as many examples in a step as the checkpoint's run had, whatever the number of ranks now.

    Raises UserError where this number of ranks cannot share them evenly.
    """
    if checkpoint is None:
        return recipe
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    size = recipe.training.get("per_device_train_batch_size", 8)
    micro_batches = recipe.training.get("gradient_accumulation_steps", 1)
    total = checkpoint.manifest.examples_per_step
    if size * micro_batches * ranks == total:
        return recipe
    shared = share_batch(total, ranks, size)
    if shared is None:
        raise UserError(
            f"{checkpoint.directory}: its steps are of {total} examples, which {ranks} ranks cannot share evenly; "
            f"start a number of ranks that divides {total}"
        )
    size, micro_batches = shared
    say(f"steps stay {total} examples: {size} x {micro_batches} micro-batches on each of {ranks} ranks")
    changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
    return recipe.model_copy(update={"training": recipe.training | changed})


def say(message: str) -> None:
    """One line for the user, of one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"sparse-zero: {message}", file=sys.stderr, flush=True)
