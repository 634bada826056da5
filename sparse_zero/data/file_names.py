"""The names of files in `data.path` and `data.data_files`. Does not import torch."""

from pathlib import Path
from typing import Any


def expanded(files: Any) -> Any:
    """The files with their home directories. Args: files: `data.data_files`."""
    if isinstance(files, dict):
        return {split: expanded(names) for split, names in files.items()}
    if isinstance(files, list):
        return [expanded(name) for name in files]
    return home(files) if isinstance(files, str) else files


def home(path: str) -> str:
    """The path with the home directory in place of a leading ~. Hub ids and URLs stay as they are."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def names_of(files: Any) -> list[str]:
    """All names in `data.data_files`."""
    if isinstance(files, dict):
        return [name for names in files.values() for name in names_of(names)]
    return [files] if isinstance(files, str) else list(files or ())
