"""PEFT's other adapters. They are recognised only for a clear error message."""

from pathlib import Path

from sparse_zero.adapters.files import CONFIG_NAME
from sparse_zero.adapters.formats.contents import Contents
from sparse_zero.adapters.formats.peft_files import is_peft
from sparse_zero.adapters.reading import read_json
from sparse_zero.errors import UserError

TITLE = "PEFT"


def matches(directory: Path) -> bool:
    return is_peft(directory)


def read(directory: Path, base: str | None) -> Contents:
    kind = read_json(directory / CONFIG_NAME)["peft_type"]
    raise UserError(
        f"{directory / CONFIG_NAME}: {kind} adapters change all scalars of a weight and cannot be converted; merge it "
        "with PEFT (merge_and_unload) and use the merged model"
    )
