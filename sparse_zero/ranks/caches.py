"""Caches of libraries when the home directory cannot be written, as in many containers and batch jobs.

`datasets`, torch's extensions and Triton write below the home directory, and end a run with an OSError if they cannot.
"""

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def use_writable_caches() -> list[str]:
    """Move the caches that cannot be written to a directory of the user below the temporary directory.

    Call it before the libraries are imported: they read the variables then. A variable that is set already stays.

    Returns: the environment variables that were set.
    """
    moved = []
    for variable, default in _defaults(os.environ).items():
        if variable not in os.environ and not _is_writable(default):
            directory = _own_directory() / variable.lower()
            directory.mkdir(exist_ok=True)
            os.environ[variable] = str(directory)
            moved.append(variable)
    return moved


def _defaults(environment: Mapping[str, str]) -> dict[str, Path]:
    """The directory of each cache, by the variable that moves it."""
    home = Path(os.path.expanduser("~"))
    caches = Path(environment.get("XDG_CACHE_HOME", home / ".cache"))
    hugging_face = Path(environment.get("HF_HOME", caches / "huggingface"))
    return {
        "HF_ASSETS_CACHE": hugging_face / "assets",
        "HF_DATASETS_CACHE": hugging_face / "datasets",
        "HF_MODULES_CACHE": hugging_face / "modules",
        "TORCH_EXTENSIONS_DIR": caches / "torch_extensions",
        "TRITON_CACHE_DIR": home / ".triton" / "cache",
    }


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _own_directory() -> Path:
    """A directory that only this user can read and write.

    Raises OSError: another user has made it.
    """
    directory = Path(tempfile.gettempdir()) / f"sparse-zero-{getpass.getuser()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory}: belongs to another user")
    return directory
