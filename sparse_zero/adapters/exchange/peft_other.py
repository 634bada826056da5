"""PEFT's other adapters, which are recognised to be refused by name."""

from pathlib import Path

from sparse_zero.adapters.exchange.contents import Contents
from sparse_zero.adapters.exchange.files import read_json
from sparse_zero.adapters.exchange.peft_files import is_peft
from sparse_zero.adapters.files import CONFIG_NAME
from sparse_zero.errors import UserError

TITLE = "PEFT"


def recognise(directory: Path) -> bool:
    return is_peft(directory)


def read(directory: Path, base: str | None) -> Contents:
    kind = read_json(directory / CONFIG_NAME)["peft_type"]
    raise UserError(
        f"{directory / CONFIG_NAME}: {kind} adapters change weights densely and have no positions to read; "
        "merge it with PEFT (merge_and_unload) and use the merged model"
    )
