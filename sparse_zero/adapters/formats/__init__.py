"""Adapter formats of this and other programs, for `sparse-zero convert` and `sparse-zero inspect`.

Each format is a module with
    TITLE                                     its name in messages
    matches(directory) -> bool                whether a directory has this format, judged by its files
    read(directory, base) -> Contents         read a directory (base: the base model, if the user names it)
    write(adapter, directory) -> dict         write an `Adapter` and return facts for the user
Some formats are only read, others only written.
All of them raise UserError for files that cannot be read, or an adapter that the format cannot represent.
"""

import importlib
from pathlib import Path
from types import ModuleType

from sparse_zero.adapters.formats.contents import Contents
from sparse_zero.errors import UserError

_MODULES = {
    "sparse-zero": "native",
    "sparta": "sparta",
    "shira": "shira",
    "supertuning": "supertuning",
    "paca": "paca",
    "model": "model_delta",
    "peft": "peft_other",
}
"""The module of each format that is read, in the order in which they are tried."""
_ONLY_WRITTEN = {"lora": "lora"}


def format_module(name: str) -> ModuleType:
    """Import the module of a format. Most of them import transformers, which takes seconds."""
    return importlib.import_module(f"{__name__}.{(_MODULES | _ONLY_WRITTEN)[name]}")


def detect(directory: str | Path) -> str:
    """The name of a directory's format. Raises UserError if it has no known format."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    for name in _MODULES:
        if format_module(name).matches(directory):
            return name
    raise UserError(
        f"{directory}: no known adapter or model: expected adapter_config.json (sparse-zero, PEFT's SHiRA, "
        "Super-Tuning and PaCA), sparse_deltas.safetensors or sparse_deltas.pt (peft-sparta), or config.json with "
        "model.safetensors or model.safetensors.index.json (a fine-tuned model)"
    )


def read(directory: str | Path, base: str | None = None, max_density: float | None = None) -> Contents:
    """Read a directory of any format, and check its tensors as far as that is possible without the base model.

    Args:
        directory: an adapter, or a fine-tuned model.
        base: the base model's directory or hub id, if the directory does not name it or names another.
        max_density: see `model_delta.read`.

    Raises:
        UserError: the format is not known, or a file is damaged.
    """
    name = detect(directory)
    options = (max_density,) if name == "model" and max_density is not None else ()
    contents = format_module(name).read(Path(directory), base, *options)
    contents.check_tensors()
    return contents
