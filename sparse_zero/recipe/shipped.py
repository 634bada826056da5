"""The recipes, DeepSpeed files and batch scripts that ship with the package. Imports no torch."""

from importlib.resources import files
from pathlib import Path


def directory() -> Path:
    """Where they are installed."""
    return Path(str(files("sparse_zero.recipe"))) / "configs"


def find(name: str | Path) -> Path | None:
    """A shipped file by its name, with or without `configs/` before it, as it stands in a checkout; None: no such."""
    path = Path(name)
    if path.parts[:-1] not in ((), ("configs",)):
        return None
    shipped = directory() / path.name
    return shipped if shipped.is_file() else None
