"""Files of other programs, read with errors that name them."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_zero.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError: not there, or not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (not a JSON object)")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises UserError: not there, or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read_pickled(path: Path) -> Any:
    """Tensors of a `.pt` file, and nothing that could run. Raises UserError: damaged, or more than tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: damaged, or more than a file of tensors ({first_line})") from None


_FILES = ("adapter_*.json", "adapter_*.safetensors", "sparse_deltas.*", "*_init.*", "config.json")


def adapter_bytes(directory: Path) -> int:
    """Bytes of an adapter's files of any format, without model card and tokenizer."""
    return sum(path.stat().st_size for pattern in _FILES for path in directory.glob(pattern))
