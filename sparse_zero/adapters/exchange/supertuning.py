"""PEFT's Super-Tuning: the largest (or smallest) scalars of each linear layer, int(size * (1 - sparsity)) of each.

adapter_model.safetensors: `supertuning_indices`, int32 (n,) into the flattened weight; `supertuning_values` (n,).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_zero.adapters.exchange import peft_files
from sparse_zero.adapters.exchange.checkpoint import Checkpoint
from sparse_zero.adapters.exchange.contents import Contents, Selected
from sparse_zero.adapters.exchange.deltas import padded
from sparse_zero.adapters.files import CONFIG_NAME, Adapter
from sparse_zero.errors import UserError

TITLE = "PEFT Super-Tuning"
_PARTS = {"supertuning_indices": "indices", "supertuning_values": "values"}


def recognise(directory: Path) -> bool:
    return peft_files.is_peft(directory, "SUPERTUNING")


def read(directory: Path, base: str | None) -> Contents:
    """Positions that were not saved are those of the base model's largest scalars, which must be at hand."""
    config, layers, whole = peft_files.read_parts(directory, _PARTS)
    lora = sorted(name for name in whole if ".supertuning_lora_" in name)
    if config.get("r") is not None or lora:
        raise UserError(
            f"{directory / CONFIG_NAME}: a Supra adapter (r: {config.get('r')}), whose LoRA part changes weights "
            "densely; only Super-Tuning without r can be read; merge it with PEFT (merge_and_unload) and use the "
            "merged model"
        )
    largest = config.get("select_top", True)
    contents = Contents(
        origin=directory,
        format="supertuning",
        selected={},
        whole=whole,
        rule=f"{'largest' if largest else 'smallest'} scalars, sparsity {config.get('sparsity')}",
        sparse={"selection": "magnitude" if largest else "magnitude-smallest"},
        **peft_files.facts(config, base),
    )
    lacking = [name for name, parts in layers.items() if "indices" not in parts]
    weights = _base_weights(contents, base, lacking) if lacking else None
    for name, parts in layers.items():
        if name in lacking:
            (values,) = peft_files.required(directory, name, parts, "values")
            # In the order of topk itself, which is that of the values
            scores = weights.tensor(name).abs().flatten()
            if values.numel() > scores.numel():
                raise UserError(f"{directory}: '{name}' has more values than {weights.directory} has scalars there")
            indices = scores.topk(values.numel(), largest=largest).indices
        else:
            indices, values = peft_files.required(directory, name, parts, "indices", "values")
        contents.selected[name] = Selected(indices.to(torch.int64), values)
    return contents


def _base_weights(contents: Contents, base: str | None, lacking: list[str]) -> Checkpoint:
    if base is None:
        raise UserError(
            f"{contents.origin}: the indices were not saved (save_precomputed_indices=False) and must be recomputed "
            f"from the base model's weights: add --base {contents.base or 'DIR'}"
        )
    contents.notes.append("the positions were recomputed from the base model's weights")
    return Checkpoint.open(base, contents.revision, contents.architecture()).require(lacking)


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """All weights get the share of the one that has the largest, with deltas of zero at further positions."""
    targets = list(peft_files.linear_targets(adapter, TITLE))
    sizes = {name: adapter.selection(name).numel for name, _, _ in targets}
    sparsity = common_sparsity({name: (flat.numel(), sizes[name]) for name, flat, _ in targets})
    tensors, added = {}, 0
    for name, flat, values in targets:
        count = scalars_at(sparsity, sizes[name])
        added += count - flat.numel()
        if sizes[name] >= 2**31:
            raise UserError(f"'{name}' has {sizes[name]:,} scalars, more than {TITLE}'s 32-bit indices reach")
        flat, values = padded(name, flat, values, sizes[name], count)
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.supertuning_indices"] = flat.to(torch.int32)
        tensors[f"{layer}.supertuning_values"] = values
    method = {
        "peft_type": "SUPERTUNING",
        "sparsity": sparsity,
        "select_top": adapter.config.sparse.selection != "magnitude-smallest",
        "r": None,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "save_precomputed_indices": True,
    }
    peft_files.write(adapter, directory, tensors, method)
    return {"sparsity": sparsity, "padding_scalars": added}


def scalars_at(sparsity: float, size: int) -> int:
    """PEFT's own arithmetic, rounding included: another count would not load."""
    return int(size * (1 - sparsity))


def common_sparsity(counts: Mapping[str, tuple[int, int]]) -> float:
    """The largest sparsity at which every weight has room for its scalars.

    Args: counts: (scalars, size) of each weight.
    """
    sparsity = 1 - max(count / size for count, size in counts.values())
    while any(scalars_at(sparsity, size) < count for count, size in counts.values()):
        sparsity = math.nextafter(sparsity, 0)
    return sparsity
