"""PEFT's SHiRA (arXiv 2406.13175): r * (in + out) scalars of each linear layer, with the same r for all layers.

adapter_model.safetensors: `shira_indices`, int32 (2, n), rows and columns (float32 where it was saved on Windows);
`shira_weight` (n,).
"""

from pathlib import Path
from typing import Any

import torch

from sparse_zero.adapters.files import CARD_NAME, Adapter
from sparse_zero.adapters.formats import peft_files
from sparse_zero.adapters.formats.contents import Contents, SelectedScalars
from sparse_zero.adapters.formats.deltas import padded
from sparse_zero.errors import UserError

TITLE = "PEFT SHiRA"
ONLY_PEFT_MODEL = (
    "read it with PeftModel.from_pretrained or AutoPeftModel: load_adapter and from_pretrained of transformers leave "
    "out shira_indices, and the forward then raises KeyError"
)
"""transformers (5.23) loads parameters only, and would draw other indices: for mask_type "random" it does so in
silence. For any other type PEFT draws none."""
_PARTS = {"shira_indices": "indices", "shira_weight": "values"}


def matches(directory: Path) -> bool:
    return peft_files.is_peft(directory, "SHIRA")


def read(directory: Path, base: str | None) -> Contents:
    config, layers, whole = peft_files.read_parts(directory, _PARTS)
    selected = {}
    for name, parts in layers.items():
        indices, values = peft_files.required(directory, name, parts, "indices", "values")
        selected[name] = SelectedScalars(indices.movedim(0, -1) if indices.dim() == 2 else indices, values)
    return Contents(
        origin=directory,
        format="shira",
        selected=selected,
        whole=whole,
        rule=f"{config.get('mask_type')} mask, r {config.get('r')}, seed {config.get('random_seed')}",
        **peft_files.facts(config, base, directory),
    )


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """Write with the smallest r that is enough for all weights. Positions with a delta of zero are added."""
    targets = list(peft_files.linear_targets(adapter, TITLE))
    shapes = {name: adapter.selection(name).shape for name, _, _ in targets}
    needed = {name: -(-flat.numel() // sum(shapes[name])) for name, flat, _ in targets}
    r = max(needed.values())
    tensors, added = {}, 0
    for name, flat, values in targets:
        out, columns = shapes[name]
        count = r * (out + columns)
        if count > out * columns:
            largest = max(needed, key=needed.__getitem__)
            raise UserError(
                f"'{name}' ({out} x {columns}) has fewer than SHiRA's r * (in + out) scalars at r = {r}, which "
                f"'{largest}' needs, and r is the same for all weights; use `--to supertuning` or `--to sparta`"
            )
        added += count - flat.numel()
        flat, values = padded(name, flat, values, out * columns, count)
        row = torch.div(flat, columns, rounding_mode="trunc")
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.shira_indices"] = torch.stack([row, flat - row * columns]).to(torch.int32)
        tensors[f"{layer}.shira_weight"] = values
    method = {
        "peft_type": "SHIRA",
        "init_weights": True,
        "r": r,
        "mask_type": "stored",
        "random_seed": None,
        "fan_in_fan_out": False,
    }
    peft_files.write(adapter, directory, tensors, method)
    card = f"---\nlibrary_name: peft\n---\n\n# {TITLE} adapter\n\nThe positions are those of shira_indices: "
    (directory / CARD_NAME).write_text(f"{card}{ONLY_PEFT_MODEL}.\n")
    return {"r": r, "padding_scalars": added, "notes": [ONLY_PEFT_MODEL]}
