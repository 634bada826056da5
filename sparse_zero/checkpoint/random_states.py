"""The states of all random generators of a process, as tensors of bytes, so that a checkpoint contains no pickle."""

import random
import struct

import numpy as np
import torch

PREFIX = "random."
"""Precedes the names of these tensors in a shard."""


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
    if "python" in states:
        raw = states["python"].numpy().tobytes()
        *words, gauss = struct.unpack(f"<{(len(raw) - 8) // 4}Ld", raw)
        random.setstate((3, tuple(words), None if gauss != gauss else gauss))
    if "numpy" in states:
        raw = states["numpy"].numpy().tobytes()
        position, has_gauss, cached = struct.unpack("<LLd", raw[-16:])
        np.random.set_state(("MT19937", np.frombuffer(raw[:-16], "<u4"), position, has_gauss, cached))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "accelerator" in states and torch.accelerator.is_available():
        _device_module().set_rng_state(states["accelerator"])


def _device_module():
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
