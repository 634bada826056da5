"""Whether a host can read a run's inputs: its files, the base model and the data. Imports no torch."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

BUILDERS = ("csv", "json", "parquet", "text")
"""Values of data.path that name a builder of `datasets`, which reads data.data_files."""
FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")

Source = dict[str, Any]
"""See `inspect_sources`."""


def sources_request(
    model: str, tokenizer: str | None, data: str, data_files: Any, revision: str | None
) -> dict[str, Any]:
    """The argument of `inspect_sources` for the values of a recipe."""
    return {
        "model.name": {"kind": "model", "name": model, "revision": revision},
        **({"model.tokenizer": {"kind": "model", "name": tokenizer, "revision": None}} if tokenizer else {}),
        "data.path": {"kind": "dataset", "name": data, "files": data_files},
    }


def inspect_sources(requested: dict[str, dict[str, Any]]) -> dict[str, Source]:
    """Find the model, tokenizer and data of a recipe on this host.

    Args: requested: see `sources_request`.

    Returns: for each key of the recipe a dict with
        `name`: the recipe's value;
        `place`: directory, file, files, package or hub;
        `path`: where it is;
        `problem`: why it cannot be read, None if it can;
        `content`: of a file or directory, a checksum of its content or of the names and sizes of its files;
        `cached`, `offline`: of a name on the hub, whether this host's cache has it and HF_HUB_OFFLINE is set;
        `scalars`: of a model, the number of its parameters, from the headers of its safetensors files.
    """
    return {key: {"name": each["name"], **_inspect(**each)} for key, each in requested.items()}


def _inspect(kind: str, name: str, revision: str | None = None, files: Any = None) -> Source:
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
        problem = "it is a file, not a model directory" if kind == "model" and path.suffix != ".gguf" else None
        return {"place": "file", "path": str(path), "problem": problem, "content": checksum(path)}
    if (
        kind == "model"
        and path.suffix == ".gguf"
        and name.count("/") > 1
        and not path.is_absolute()
        and name[0] != "."
    ):
        organisation, repository, file = name.split("/", 2)
        return _hub(kind, f"{organisation}/{repository}", revision, file)
    if path.is_absolute() or name.startswith(("./", "../")) or path.suffix in FILE_SUFFIXES or name.count("/") > 1:
        return {"place": "directory", "path": name, "problem": "no such file or directory"}
    return _hub(kind, name, revision)


def _files(builder: str, files: Any) -> Source:
    named = [files] if isinstance(files, str) else list(files.values()) if isinstance(files, dict) else files or []
    flat = [each for entry in named for each in ([entry] if isinstance(entry, str) else entry)]
    missing = [each for each in flat if "://" not in each and not _matches(each)]
    problem = f"no such file: {', '.join(missing)}" if missing else None if flat else "data.data_files is empty"
    return {"place": "files", "path": ", ".join(flat) or builder, "problem": problem}


def _matches(pattern: str) -> bool:
    path = Path(pattern)
    return path.exists() or any(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))


def _hub(kind: str, name: str, revision: str | None, gguf: str | None = None) -> Source:
    """Whether this host's cache has a model or dataset of the hub. Args: gguf: the model's GGUF file."""
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
    found = try_to_load_from_cache(name, gguf or "config.json", revision=revision)
    if gguf or not isinstance(found, str):
        return {**source, "cached": isinstance(found, str)}
    snapshot = Path(found).parent
    weights = [file for pattern in ("*.safetensors", "*.bin") for file in snapshot.glob(pattern)]
    return {**source, "cached": any(file.exists() for file in weights), "scalars": count_scalars(snapshot)}


def checksum(path: Path) -> str | None:
    """A checksum of a file's content, or only of its size if it is larger than 16 MiB. None if there is no file."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    content = path.read_bytes() if size <= 2**24 else b""
    return hashlib.sha256(f"{size}\n".encode() + content).hexdigest()[:16]


def listing_checksum(directory: Path) -> str:
    """A checksum of the names and sizes of a directory's files, without subdirectories. Reading their content may take
    minutes.
    """
    files = sorted((file.name, file.stat().st_size) for file in directory.iterdir() if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def count_scalars(directory: Path) -> int | None:
    """The number of scalars in all safetensors files of a model directory, read from the files' headers. None if there
    is no such file, or one cannot be read.
    """
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
    """`path` itself, or its nearest parent that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
