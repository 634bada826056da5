"""What belongs to a model beside its weights: its licence, its processor and what its card says about the licence."""

import fnmatch
import os
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download, try_to_load_from_cache

from sparse_zero.data.gguf import SUFFIX
from sparse_zero.data.package import package_path

LICENCES = ("LICEN[SC]E*", "NOTICE*", "COPYING*", "USE_POLICY*")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_CARD = "README.md"
_KEYS = ("license", "license_name", "license_link")


def copy_companions(base: str, revision: str | None, out: Path) -> None:
    """Copy the licence and the processor of a base model to the directory of a merged one. Files there stay.

    Args: base, revision: as of `load_model`; out: an existing directory.
    """
    directory = _directory(base)
    if directory is None:
        patterns = [*LICENCES, *PROCESSORS, _CARD]
        try:
            directory = Path(snapshot_download(_repository(base), revision=revision, allow_patterns=patterns))
        except Exception:  # the model was in the cache, and the hub cannot be reached
            return
    for file in sorted(directory.iterdir()):
        wanted = any(fnmatch.fnmatchcase(file.name, pattern) for pattern in (*LICENCES, *PROCESSORS))
        if wanted and file.is_file() and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def licence_of(base: str | None, revision: str | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the card of a base model, if this machine has it."""
    if base is None:
        return {}
    try:
        directory = _directory(base)
        if directory is None:
            found = try_to_load_from_cache(_repository(base), _CARD, revision=revision)
            card = Path(found) if isinstance(found, str) else None
        else:
            card = directory / _CARD
        if card is None or not card.is_file():
            return {}
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # a card that cannot be read says nothing
        return {}
    return {key: metadata.get(key) for key in _KEYS if isinstance(metadata.get(key), str)}


def hub_id(base: str | None) -> str | None:
    """The repository of a base model on the hub; None for a model of this machine or of a package."""
    if base is None or "://" in base or base.startswith(("/", ".", "~")) or os.path.exists(base):
        return None
    repository = _repository(base)
    return repository if repository.count("/") <= 1 else None


def _repository(base: str) -> str:
    """The repository of a name on the hub, which may be that of a GGUF file in it."""
    return "/".join(base.split("/")[:2]) if base.endswith(SUFFIX) else base


def _directory(base: str) -> Path | None:
    """A model's directory, or that of its GGUF file. None if it is on the hub."""
    path = Path(package_path(base))
    return path if path.is_dir() else path.parent if path.is_file() else None
