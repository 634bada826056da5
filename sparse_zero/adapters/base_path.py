"""Finds the base model of an adapter whose recipe named it by a relative path, from any working directory."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def find_base(name: str | None, directory: Path) -> str | None:
    """The base model as it can be opened from here.

    A relative path was relative to the directory in which the run was started: one of those in which the adapter lies
    (OUTPUT_DIR/adapter, with OUTPUT_DIR below it). Whether its weights are the right ones is checked later, by the
    fingerprint.

    Args:
        name: a hub id, a path or package://PACKAGE/PATH, as the recipe had it; None if the adapter names none.
        directory: the adapter's directory.

    Returns: `name`, or the path of the directory of this name beside the adapter, if there is none here.
    """
    if name is None or "://" in name or Path(name).is_absolute() or Path(name).exists():
        return name
    for parent in directory.absolute().parents:
        found = parent / name
        if (found / "config.json").is_file():
            logger.warning("%s: its base model '%s' is taken from %s", directory, name, found)
            return str(found)
    return name
