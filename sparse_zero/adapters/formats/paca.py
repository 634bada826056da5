"""PEFT's PaCA (arXiv 2503.01905, PEFT 0.22 and later): r random input columns of each linear layer.

The difference of the columns is paca_alpha / r times what was trained.

adapter_model.safetensors: `paca_delta` (out, r) and `paca_indices`, int64 (r,), the columns.
"""

import math
from pathlib import Path

import torch

from sparse_zero.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from sparse_zero.adapters.formats import peft_files
from sparse_zero.adapters.formats.contents import Contents, SelectedScalars
from sparse_zero.errors import UserError

TITLE = "PEFT PaCA"
_PARTS = {"paca_indices": "columns", "paca_delta": "differences"}


def matches(directory: Path) -> bool:
    return peft_files.is_peft(directory, "PACA")


def read(directory: Path, base: str | None) -> Contents:
    config, layers, whole = peft_files.read_parts(directory, _PARTS)
    r, alpha = config.get("r"), config.get("paca_alpha")
    if not (type(r) is int and r > 0 and type(alpha) in (int, float) and math.isfinite(alpha)):
        raise UserError(f"{directory / CONFIG_NAME}: damaged: r is {r!r} and paca_alpha {alpha!r}, not numbers")
    selected = {}
    for name, parts in layers.items():
        columns, differences = peft_files.required(directory, name, parts, "columns", "differences")
        if differences.dim() != 2 or columns.shape != (r,) or differences.shape[1] != r:
            raise UserError(
                f"{directory / WEIGHTS_NAME}: damaged: '{name}' has columns {list(columns.shape)} and differences "
                f"{list(differences.shape)}, but r is {r}"
            )
        if columns.dtype not in (torch.int64, torch.int32):
            raise UserError(f"{directory / WEIGHTS_NAME}: damaged: '{name}' has columns in {columns.dtype}")
        rows = torch.arange(differences.shape[0])
        indices = torch.cartesian_prod(rows, columns.to(torch.int64))
        selected[name] = SelectedScalars(indices, (differences * (alpha / r)).flatten(), rows=len(rows))
    return Contents(
        origin=directory,
        format="paca",
        selected=selected,
        whole=whole,
        rule=f"{r} columns, seed {config.get('random_seed')}",
        **peft_files.facts(config, base, directory),
    )
