"""What a host sees of a run's inputs: its files, the base model, the data. Imports no torch."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

BUILDERS = ("csv", "json", "parquet", "text")
"""Names that `datasets` reads files by."""
FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")

Source = dict[str, Any]


def question(model: str, tokenizer: str | None, data: str, data_files: Any, revision: str | None) -> dict[str, Any]:
    """What to ask `look` for, from a recipe's values."""
    return {
        "model.name": {"kind": "model", "name": model, "revision": revision},
        **({"model.tokenizer": {"kind": "model", "name": tokenizer, "revision": None}} if tokenizer else {}),
        "data.path": {"kind": "dataset", "name": data, "files": data_files},
    }


def look(asked: dict[str, dict[str, Any]]) -> dict[str, Source]:
    """An answer for each key of a recipe.

    Returns: `name`, `place` (directory, file, hub or files), `path`, `problem` (None: it is there), `content` (a
        checksum of names and sizes), `cached` (of a hub's), and of models `scalars`, counted from the headers of
        safetensors files.
    """
    return {key: {"name": each["name"], **_look(**each)} for key, each in asked.items()}


def _look(kind: str, name: str, revision: str | None = None, files: Any = None) -> Source:
    try:
        path = Path(package_path(name))
    except UserError as problem:
        return {"place": "package", "path": name, "problem": str(problem)}
    if kind == "dataset" and name in BUILDERS:
        return _files(name, files)
    if path.is_dir():
        problem = "it has no config.json" if kind == "model" and not (path / "config.json").is_file() else None
        source = {"place": "directory", "path": str(path), "problem": problem, "content": listing_checksum(path)}
        return {**source, "scalars": count_scalars(path)} if kind == "model" else source
    if path.is_file():
        problem = "it is a file, not a model's directory" if kind == "model" else None
        return {"place": "file", "path": str(path), "problem": problem, "content": checksum(path)}
    if path.is_absolute() or name.startswith(("./", "../")) or path.suffix in FILE_SUFFIXES or name.count("/") > 1:
        return {"place": "directory", "path": name, "problem": "no such file or directory"}
    return _hub(kind, name, revision)


def _files(builder: str, files: Any) -> Source:
    named = [files] if isinstance(files, str) else list(files.values()) if isinstance(files, dict) else files or []
    flat = [each for entry in named for each in ([entry] if isinstance(entry, str) else entry)]
    missing = [each for each in flat if "://" not in each and not _matches(each)]
    problem = f"no such file: {', '.join(missing)}" if missing else None if flat else "data.data_files names no file"
    return {"place": "files", "path": ", ".join(flat) or builder, "problem": problem}


def _matches(pattern: str) -> bool:
    path = Path(pattern)
    return path.exists() or any(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))


def _hub(kind: str, name: str, revision: str | None) -> Source:
    """A name on the hub: whether it lies in this host's cache."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    source = {"place": "hub", "path": name, "problem": None, "offline": offline, "cached": False}
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return source
    folder = f"{kind}s--{name.replace('/', '--')}"
    if kind == "dataset":
        prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME, "datasets")))
        places = (prepared / name.replace("/", "___"), Path(constants.HF_HUB_CACHE, folder))
        return {**source, "cached": any(place.is_dir() for place in places)}
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        return source
    snapshot = Path(found).parent
    weights = [file for pattern in ("*.safetensors", "*.bin") for file in snapshot.glob(pattern)]
    return {**source, "cached": any(file.exists() for file in weights), "scalars": count_scalars(snapshot)}


def checksum(path: Path) -> str | None:
    """Of a file's content; of a large file, of its size. None where there is none."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    content = path.read_bytes() if size <= 2**24 else b""
    return hashlib.sha256(f"{size}\n".encode() + content).hexdigest()[:16]


def listing_checksum(directory: Path) -> str:
    """Of the names and sizes of the files in it, not below; its content may take minutes to read."""
    files = sorted((file.name, file.stat().st_size) for file in directory.iterdir() if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def count_scalars(directory: Path) -> int | None:
    """Of all safetensors files of a model's directory, by their headers; None where there are none."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in directory.glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
    return total or None


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
