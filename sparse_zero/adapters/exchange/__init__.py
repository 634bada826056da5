"""Adapters of other programs: recognised, read, and written. `sparse-zero convert` and `inspect` stand on this.

Each format is a module with
    TITLE                                     what people call it
    recognise(directory) -> bool              whether a directory is of this format, by its files alone
    read(directory, base) -> Contents         what it holds (base: where the base model is, if the user says so)
    write(adapter, directory) -> dict         write an `Adapter`; facts for the user. Not of every format
All of them raise UserError for what cannot be read, or what the format cannot hold.
"""

import importlib
from pathlib import Path
from types import ModuleType

from sparse_zero.adapters.exchange.contents import Contents
from sparse_zero.errors import UserError

_MODULES = {
    "sparse-zero": "own",
    "sparta": "sparta",
    "shira": "shira",
    "supertuning": "supertuning",
    "model": "model_delta",
    "peft": "peft_other",
}
"""In the order in which a directory is tried."""


def format_of(name: str) -> ModuleType:
    """The module of a format. Imported when it is asked for: most of them need transformers, which takes seconds."""
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")


def recognise(directory: str | Path) -> str:
    """The format of a directory, by name. Raises UserError: none of them."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    for name in _MODULES:
        if format_of(name).recognise(directory):
            return name
    raise UserError(
        f"{directory}: no known adapter or model: looked for adapter_config.json (sparse-zero, PEFT's SHiRA and "
        "Super-Tuning), sparse_deltas.safetensors or sparse_deltas.pt (peft-sparta), and config.json with "
        "model.safetensors or model.safetensors.index.json (a fine-tuned model)"
    )


def read(directory: str | Path, base: str | None = None) -> Contents:
    """What a directory of any format holds. Raises UserError: see the formats."""
    return format_of(recognise(directory)).read(Path(directory), base)
