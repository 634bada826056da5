"""The names of checkpoints in a run's directory. Imports no torch: who starts a run looks at them, too."""

import re
from pathlib import Path

MANIFEST_NAME = "manifest.json"
ABANDONED_NAME = "abandoned"
"""The directory, in a run's directory, of the checkpoints that are not of its branch any more."""

NAME = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_MOVING = re.compile(r"after-(\d+)\.moving")


def checkpoint_path(output: Path, step: int) -> Path:
    """The directory of a step's checkpoint. Args: output: the run's directory."""
    return output / f"checkpoint-{step}"


def list_checkpoints(output: Path) -> list[Path]:
    """All directories in `output` that are named like a checkpoint, complete or not, in the order of their steps.

    Those that are being moved aside do not count, also if they are still there.
    """
    moving = unfinished_move(output)
    return list_newer(output, -1, None if moving is None else moving[1])


def list_newer(output: Path, after: int, until: int | None = None) -> list[Path]:
    """As `list_checkpoints`, of the steps above `after` and up to `until`, also those that are being moved aside."""
    if not output.is_dir():
        return []
    found = [
        (int(match[1]), match[2] is None, path)
        for path in output.iterdir()
        if (match := NAME.fullmatch(path.name)) and path.is_dir()
    ]
    # checkpoint-N.replaced precedes checkpoint-N, so that the last element is the newest.
    return [path for step, _, path in sorted(found) if after < step <= (step if until is None else until)]


def unfinished_move(output: Path) -> tuple[Path, int] | None:
    """The directory to which a run's checkpoints of the steps above N are being moved aside, and N; None if there is
    no such move.
    """
    abandoned = output / ABANDONED_NAME
    if not abandoned.is_dir():
        return None
    found = [(path, int(match[1])) for path in abandoned.iterdir() if (match := _MOVING.fullmatch(path.name))]
    return min(found, key=lambda entry: entry[1], default=None)
