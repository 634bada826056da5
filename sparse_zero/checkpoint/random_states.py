"""The states of all random generators of a process, as tensors of bytes, so that a checkpoint contains no pickle."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_zero.errors import UserError, first_line

PREFIX = "random."
"""Precedes the names of these tensors in a shard."""

_NUMPY_WORDS = 624
"""Number of words in the state of numpy's generator."""


def capture() -> dict[str, torch.Tensor]:
    """Returns: 1-D uint8 tensors by generator: python, numpy, torch, and accelerator (this rank's device)."""
    _, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937", name
    states = {
        "python": _bytes(struct.pack(f"<{len(words)}Ld", *words, float("nan") if gauss is None else gauss)),
        "numpy": _bytes(keys.astype("<u4").tobytes() + struct.pack("<LLd", position, has_gauss, cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        states["accelerator"] = _device_module().get_rng_state().cpu()
    return states


def restore(states: dict[str, torch.Tensor]) -> None:
    """The reverse of `capture`. A generator that is not in `states` keeps its own state."""
    _restore(states, random, np.random, torch.set_rng_state, lambda state: _device_module().set_rng_state(state))


def check(states: dict[str, torch.Tensor], origin: str | Path) -> None:
    """Check that `restore` can use these states.

    Args: origin: the file, for errors.

    Raises UserError: a generator does not accept its state.
    """
    try:
        for name, state in states.items():
            if state.dtype != torch.uint8 or state.dim() != 1:
                raise ValueError(f"{name}: {state.dtype} {list(state.shape)}")
        _restore(states, random.Random(), np.random.RandomState(), torch.Generator().set_state, _check_on_accelerator)
    except (ValueError, TypeError, RuntimeError, OverflowError, struct.error) as error:
        raise UserError(f"{origin}: damaged: not the state of a random generator ({first_line(error)})") from None


def _restore(
    states: dict[str, torch.Tensor],
    python: Any,
    numpy: Any,
    set_torch: Callable[[torch.Tensor], object],
    set_accelerator: Callable[[torch.Tensor], object],
) -> None:
    if "python" in states:
        raw = states["python"].numpy().tobytes()
        *words, gauss = struct.unpack(f"<{(len(raw) - 8) // 4}Ld", raw)
        python.setstate((3, tuple(words), None if gauss != gauss else gauss))
    if "numpy" in states:
        raw = states["numpy"].numpy().tobytes()
        position, has_gauss, cached = struct.unpack("<LLd", raw[-16:])
        if position > _NUMPY_WORDS or has_gauss > 1:
            raise ValueError(f"numpy: position {position}")
        numpy.set_state(("MT19937", np.frombuffer(raw[:-16], "<u4"), position, has_gauss, cached))
    if "torch" in states:
        set_torch(states["torch"])
    if "accelerator" in states and torch.accelerator.is_available():
        set_accelerator(states["accelerator"])


def _check_on_accelerator(state: torch.Tensor) -> None:
    torch.Generator(torch.accelerator.current_accelerator()).set_state(state)


def _device_module():
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
