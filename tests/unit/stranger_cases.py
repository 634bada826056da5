"""What strangers write into adapters, and that every command refuses it."""

import json
import shutil
import time
from pathlib import Path

import pytest
import xxhash
from adapter_cases import edit_config, fresh, train

from sparse_zero.adapters.combine import combine_adapters
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "model.layers.0.self_attn.v_proj.weight"
AT_ONCE = 5.0
"""Seconds."""


def trained_adapter(base: Path, out: Path, **settings: object) -> Path:
    model = sparsify(fresh(base), SparseConfig(**{"density": 0.04, "seed": 11} | settings))
    train(model)
    save_adapter(model, out)
    return out


def reseal(adapter: Path, name: str = WEIGHTS) -> None:
    """The checksum of a changed file, as whoever changes it can write it."""
    checksum = xxhash.xxh3_128_hexdigest((adapter / name).read_bytes())
    edit_config(adapter, lambda config: config["files"].update({name: checksum}))


def set_in(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def claim(adapter: Path, **entries: object) -> None:
    edit_config(adapter, lambda config: config["tensors"][NAME].update(entries))


def refused_everywhere(adapter: Path, base: Path, out: Path, but: tuple[str, ...] = ()) -> str:
    """The message of every command, which must be the same kind of error at once. Args: but: what may succeed."""
    calls = {
        "inspect": lambda: describe(adapter),
        "convert": lambda: convert(adapter, out, "sparta"),
        "merge": lambda: write_merged(adapter, out),
        "combine": lambda: combine_adapters([adapter, adapter], out),
        "load": lambda: load_adapter(fresh(base), adapter),
    }
    messages = []
    for name, call in calls.items():
        started = time.monotonic()
        if name in but:
            call()
            shutil.rmtree(out, ignore_errors=True)
        else:
            with pytest.raises(UserError) as error:
                call()
            messages.append(str(error.value))
            assert not out.exists(), name
        assert time.monotonic() - started < AT_ONCE, name
    return messages[-1]
