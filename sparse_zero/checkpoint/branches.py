"""Moves the checkpoints aside that a run leaves when it resumes from an earlier one.

OUTPUT_DIR/
    checkpoint-10
    checkpoint-20                the run resumes from here
    checkpoint-25                and saves this
    abandoned/after-20/
        checkpoint-30            what had been saved after step 20
        checkpoint-40

Otherwise the newest checkpoint would still be that of the branch that was left: the next resume would take it, and
what is saved now would be deleted as the oldest.

The move is one step for every reader. The directory abandoned/after-20.moving says that the checkpoints above 20 have
been left, wherever they are; `list_checkpoints` leaves them out. It gets its final name when they all are in it. If
the run is killed between, the next one finishes the move.
"""

import json
from pathlib import Path

from sparse_zero.checkpoint.directory import TRAINER_STATE_NAME, Checkpoint
from sparse_zero.checkpoint.listing import ABANDONED_NAME, list_newer, unfinished_move
from sparse_zero.checkpoint.shards import flush_directory
from sparse_zero.errors import UserError


def leave_branch(output: Path, step: int) -> dict[Path, Path]:
    """Move the checkpoints of the steps above `step` to abandoned/after-STEP.

    Only one process may call this, and none may save meanwhile.

    Args:
        output: the run's directory.
        step: of the checkpoint from which the run resumes; 0 to leave all checkpoints.

    Returns: the new path of each checkpoint by its old one, in the order of their steps.

    Raises UserError: a checkpoint cannot be moved. Then the move is finished at the next call of `finish_leaving`.
    """
    finish_leaving(output)
    left = list_newer(output, step)
    if not left:
        return {}
    moving = output / ABANDONED_NAME / f"after-{step}.moving"
    try:
        moving.mkdir(parents=True)
        flush_directory(moving.parent)
    except OSError as error:
        raise UserError(f"{moving.parent}: cannot be created ({error.strerror}), for {_describe(left)}") from None
    final = finish_leaving(output)
    return {path: final / path.name for path in left}


def finish_leaving(output: Path) -> Path | None:
    """Finish a move that was interrupted. Only one process may call this, and none may save meanwhile.

    Returns: the directory to which the checkpoints were moved; None if there was nothing to finish.

    Raises UserError: a checkpoint cannot be moved.
    """
    if (unfinished := unfinished_move(output)) is None:
        return None
    moving, step = unfinished
    left = list_newer(output, step)
    try:
        for path in left:
            path.rename(moving / path.name)
        flush_directory(moving)
        flush_directory(output)
        final = _free_name(moving.with_suffix(""))
        moving.rename(final)
        flush_directory(final.parent)
    except OSError as error:
        raise UserError(
            f"{moving}: {_describe(left) or 'it'} cannot be moved there ({error.strerror}); move the checkpoints of "
            f"{output} that are newer than step {step} to another directory, and remove this one"
        ) from None
    return final


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _describe(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def best_before(checkpoint: Checkpoint) -> Path | None:
    """The best checkpoint of a run until the step of `checkpoint`, if it still exists. It is looked for beside
    `checkpoint`, because the run's directory may have been moved, then where it was saved.
    """
    state = json.loads((checkpoint.directory / TRAINER_STATE_NAME).read_text())
    recorded, step = state.get("best_model_checkpoint"), state.get("best_global_step")
    if not recorded:
        return None
    for path in (checkpoint.directory.with_name(Path(recorded).name), Path(recorded)):
        try:
            manifest = Checkpoint(path).manifest
        except UserError:
            continue
        if manifest.run == checkpoint.manifest.run and manifest.step == (step or manifest.step):
            return path
    return None
