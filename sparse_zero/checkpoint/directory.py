"""The directory of a checkpoint, which is either complete or absent.

checkpoint-100/
    shard-00000-of-00004.safetensors    one per rank: its scalars' float32 values and moments, its random states
    trainer_state.json                  written by transformers: steps, log, best metric, states of callbacks
    settings.json                       the settings of the run, see `settings`
    fixed.safetensors                   only if positions cannot be drawn again, or rows are trained in full
    manifest.json                       written last: every file with its size and checksum, and what all ranks share

The ranks write to checkpoint-100.tmp-RUN, flush it, and rename it when it is complete. Only directories named
checkpoint-N are checkpoints. The one with the largest N is the newest; clocks are not used. Those that a run leaves
when it resumes from an earlier one are moved aside, see `branches`. `listing` finds them by name.
"""

import logging
import re
import shutil
from pathlib import Path

import xxhash

from sparse_zero.checkpoint.listing import NAME, list_checkpoints
from sparse_zero.checkpoint.manifest import read_manifest
from sparse_zero.checkpoint.shards import check_digest, check_size, flush_directory
from sparse_zero.errors import UserError

logger = logging.getLogger(__name__)

FIXED_NAME = "fixed.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"
SETTINGS_NAME = "settings.json"

_TEMPORARY = re.compile(r"checkpoint-\d+\.(tmp|deleted)-\w+")


class Checkpoint:
    """A complete checkpoint on disk."""

    def __init__(self, directory: str | Path) -> None:
        """Open a checkpoint. The content of the shards is verified later, when it is read.

        Raises UserError, with the name of the file: the manifest is missing or damaged, or a file is missing or does
        not have the size that was written.
        """
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        for shard in self.manifest.shards:
            check_size(self.directory / shard.name, shard.file)
        for name, record in self.manifest.files.items():
            check_digest(self.directory / name, record)

    @property
    def step(self) -> int:
        return self.manifest.step


def temporary_path(directory: Path, run: str) -> Path:
    """The directory to which a checkpoint is written until it is complete."""
    return directory.with_name(f"{directory.name}.tmp-{run}")


def publish(written: Path, directory: Path) -> None:
    """Give a complete checkpoint its name in one step, and replace an older one of that name. Raises OSError."""
    flush_directory(written)
    replaced = directory.with_name(f"{directory.name}.replaced")
    if directory.exists():
        # Between the two renames the old checkpoint is still found, as checkpoint-N.replaced.
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    written.rename(directory)
    flush_directory(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def newest_complete(output: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns: the newest complete checkpoint in a run's directory, and why newer ones cannot be used."""
    problems = []
    for path in reversed(list_checkpoints(output)):
        try:
            return Checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def remove_leftovers(output: Path) -> None:
    """Remove what interrupted saves and deletions have left. Only the run that has locked `output` may call this."""
    if not output.is_dir():
        return
    for path in output.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif (match := NAME.fullmatch(path.name)) and match[2]:
            final = path.with_name(f"checkpoint-{match[1]}")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)


def _is_complete(path: Path) -> bool:
    try:
        Checkpoint(path)
    except UserError:
        return False
    return True


def delete_old(output: Path, keep: int | None, best: str | None, saved: Path | None = None) -> None:
    """Delete all but the newest complete checkpoints. The newest complete checkpoint is never deleted.

    Args:
        output: the run's directory.
        keep: how many to keep, including the best; None or 0: all.
        best: a checkpoint to keep at any age, which may be in another directory.
        saved: the checkpoint that was just saved, which is never deleted.
    """
    if keep is None or keep <= 0:
        return
    complete = [path for path in list_checkpoints(output) if _is_complete(path)]
    protected = {path.resolve() for path in [*complete[-1:], saved, best and Path(best)] if path}
    others = [path for path in complete if path.resolve() not in protected]
    surplus = len(complete) - max(keep, len(complete) - len(others))
    for path in others[: max(0, surplus)]:
        deleted = path.with_name(f"{path.name}.deleted-{xxhash.xxh3_64_hexdigest(path.name.encode())}")
        try:
            # An interrupted deletion must not leave an incomplete checkpoint under this name.
            path.rename(deleted)
            shutil.rmtree(deleted)
        except OSError as error:
            logger.warning("%s: cannot be deleted (%s)", path, error.strerror)
