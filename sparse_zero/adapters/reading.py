"""Reading files that may come from anybody: no code runs, only regular files are opened, and what a reader allocates
is bounded by the size of its file. All functions raise UserError, with the file's name, for what they cannot read.
"""

import json
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from sparse_zero.errors import UserError, first_line

JSON_BYTES = 64 * 2**20
"""The largest JSON file that is read. The largest models have some 10 MB of names."""

DEPTH = 64
"""The deepest nesting of lists and objects in a JSON file."""

Kind = TypeVar("Kind")

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_regular(path: Path) -> int:
    """Check that a path is a regular file, or a link to one: to open a FIFO would block, and a device may never end.

    Returns: its size in bytes.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is not a file but a directory, pipe or device")
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object in UTF-8. Keys that occur twice, null characters and half surrogate pairs are refused."""
    if (size := check_regular(path)) > JSON_BYTES:
        raise UserError(f"{path}: has {size:,} bytes, more than the {JSON_BYTES:,} that are read as JSON")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        _check_plain(value)
    except RecursionError:
        raise UserError(f"{path}: damaged (nested more than {DEPTH} levels deep)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (not a JSON object)")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key '{twice}' occurs twice")
    return value


def _check_plain(value: Any) -> None:
    """Raises ValueError: a string that is not text, or a nesting deeper than DEPTH."""
    level = [value]
    for _ in range(DEPTH):
        strings = [entry for entry in level if isinstance(entry, str)]
        for part in level:
            if isinstance(part, dict):
                strings.extend(part)
        for string in strings:
            if "\0" in string:
                raise ValueError("a string has a null character")
            if not string.isascii():
                string.encode()  # half a surrogate pair raises UnicodeEncodeError, a ValueError
        level = [
            entry
            for part in level
            if isinstance(part, dict | list)
            for entry in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {DEPTH} levels deep")


def optional(content: Mapping[str, Any], key: str, kind: type[Kind], path: Path) -> Kind | None:
    """An entry of a JSON object, None if it is absent or null. Raises UserError if it has another type than `kind`."""
    value = content.get(key)
    if value is not None and type(value) is not kind:
        raise UserError(f"{path}: {key}: must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def class_name_of(config: Mapping[str, Any], path: Path) -> str | None:
    """The first name under `architectures` of a config.json. Raises UserError if it is not a list of names."""
    names = optional(config, "architectures", list, path) or [None]
    return optional({"architectures": names[0]}, "architectures", str, path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file. They are mapped from it, not copied into memory."""
    check_regular(path)
    try:
        return load_file(path)
    except Exception as error:  # also a KeyError for a dtype that torch does not have
        raise UserError(f"{path}: damaged ({first_line(error)})") from None


def read_pickled(path: Path) -> Any:
    """Read a `.pt` file with `weights_only=True`, so that no code runs."""
    size = check_regular(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise UserError(f"{path}: damaged (compressed, which torch.save does not do)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for damaged pickles
        raise UserError(f"{path}: damaged, or contains other objects than tensors ({first_line(error)})") from None
    for tensor in _tensors_in(content):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A view with strides of 0 can claim any number of scalars
        if not plain or tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path}: damaged (a tensor of shape {list(tensor.shape)} is not in the file)")
    return content


def _tensors_in(content: Any) -> list[torch.Tensor]:
    """The tensors in nested dicts and lists."""
    found, stack = [], [content]
    seen: set[int] = set()
    while stack:
        part = stack.pop()
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, dict | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            stack.extend(part.values() if isinstance(part, dict) else part)
    return found
