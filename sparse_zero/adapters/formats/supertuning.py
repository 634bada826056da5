"""PEFT's Super-Tuning (arXiv 2607.09287): the largest or smallest scalars of each linear layer.

There are int(size * (1 - sparsity)) of them in each layer.

adapter_model.safetensors: `supertuning_indices`, int32 (n,) into the flattened weight; `supertuning_values` (n,).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_zero.adapters.files import CONFIG_NAME, Adapter
from sparse_zero.adapters.formats import peft_files
from sparse_zero.adapters.formats.contents import Contents, SelectedScalars
from sparse_zero.adapters.formats.deltas import padded
from sparse_zero.adapters.formats.model_weights import ModelWeights
from sparse_zero.adapters.reading import optional
from sparse_zero.errors import UserError

TITLE = "PEFT Super-Tuning"
_PARTS = {"supertuning_indices": "indices", "supertuning_values": "values"}


def matches(directory: Path) -> bool:
    return peft_files.is_peft(directory, "SUPERTUNING")


def read(directory: Path, base: str | None) -> Contents:
    """Read an adapter. Positions that were not saved are recomputed from the base model's weights."""
    config, layers, whole = peft_files.read_parts(directory, _PARTS)
    lora = sorted(name for name in whole if ".supertuning_lora_" in name)
    if config.get("r") is not None or lora:
        raise UserError(
            f"{directory / CONFIG_NAME}: a Supra adapter (r: {config.get('r')}), whose LoRA part changes all scalars "
            "of a weight; only Super-Tuning without r can be converted; merge it with PEFT (merge_and_unload) and use "
            "the merged model"
        )
    largest = optional(config, "select_top", bool, directory / CONFIG_NAME) is not False
    contents = Contents(
        origin=directory,
        format="supertuning",
        selected={},
        whole=whole,
        rule=f"{'largest' if largest else 'smallest'} scalars, sparsity {config.get('sparsity')}",
        sparse={"selection": "magnitude" if largest else "magnitude-smallest"},
        **peft_files.facts(config, base, directory),
    )
    without_indices = [name for name, parts in layers.items() if "indices" not in parts]
    weights = _base_weights(contents, base, without_indices) if without_indices else None
    for name, parts in layers.items():
        if name in without_indices:
            (values,) = peft_files.required(directory, name, parts, "values")
            # Not sorted: the values are in the order of topk
            scores = weights.tensor(name).abs().flatten()
            if values.numel() > scores.numel():
                raise UserError(f"{directory}: '{name}' has more values than the weight in {weights.directory}")
            indices = scores.topk(values.numel(), largest=largest).indices
        else:
            indices, values = peft_files.required(directory, name, parts, "indices", "values")
        contents.selected[name] = SelectedScalars(indices, values)
    return contents


def _base_weights(contents: Contents, base: str | None, names: list[str]) -> ModelWeights:
    if base is None:
        raise UserError(
            f"{contents.origin}: the indices were not saved (save_precomputed_indices=False) and must be recomputed "
            f"from the base model's weights: add --base {contents.base or 'DIR'}"
        )
    contents.notes.append("the positions were recomputed from the base model's weights")
    return ModelWeights.open(base, contents.revision, contents.architecture()).require(names)


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """Write with the largest sparsity that is enough for all weights. Positions with a delta of zero are added."""
    targets = list(peft_files.linear_targets(adapter, TITLE))
    sizes = {name: adapter.selection(name).numel for name, _, _ in targets}
    sparsity = common_sparsity({name: (flat.numel(), sizes[name]) for name, flat, _ in targets})
    tensors, added = {}, 0
    for name, flat, values in targets:
        count = scalars_at(sparsity, sizes[name])
        added += count - flat.numel()
        if sizes[name] >= 2**31:
            raise UserError(f"'{name}' has {sizes[name]:,} scalars, too many for {TITLE}'s 32-bit indices")
        flat, values = padded(name, flat, values, sizes[name], count)
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.supertuning_indices"] = flat.to(torch.int32)
        tensors[f"{layer}.supertuning_values"] = values
    method = {
        "peft_type": "SUPERTUNING",
        "init_weights": True,
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
    """The number of selected scalars, rounded as in PEFT, which does not load any other number."""
    return int(size * (1 - sparsity))


def common_sparsity(counts: Mapping[str, tuple[int, int]]) -> float:
    """The largest sparsity at which all weights can have their selected scalars.

    Args:
        counts: for each weight the number of selected scalars and of all scalars.
    """
    sparsity = 1 - max(count / size for count, size in counts.values())
    while any(scalars_at(sparsity, size) < count for count, size in counts.values()):
        sparsity = math.nextafter(sparsity, 0)
    return sparsity
