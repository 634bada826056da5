"""PEFT's LoRA (arXiv 2106.09685), written from an adapter whose positions lie in few columns; see `lora_factors`.

adapter_model.safetensors: of a linear layer `lora_A.weight` (r, in) and `lora_B.weight` (out, r); of an embedding
`lora_embedding_A` (r, rows) and `lora_embedding_B` (columns, r); of E experts in one parameter `lora_A.weight`
(E * r, in), expert by expert, and `lora_B.weight` (out, r * E), rank by rank. The rank r differs by weight.

PEFT takes dense layers of some models for experts, by their names. They are written as parameters, as experts are.
"""

import importlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero.adapters.files import WEIGHTS_NAME, Adapter, row_mask
from sparse_zero.adapters.formats import peft_files
from sparse_zero.adapters.formats.architecture import Architecture, architecture_for
from sparse_zero.adapters.formats.deltas import difference
from sparse_zero.adapters.formats.lora_factors import Factored
from sparse_zero.adapters.formats.model_weights import ModelWeights
from sparse_zero.errors import UserError
from sparse_zero.selection.targets import Target, is_experts, is_linear

TITLE = "PEFT LoRA"
Kind = Literal["linear", "conv1d", "embedding", "parameter", "experts"]
_PARAMETERS = ("parameter", "experts")
"""The kinds in `target_parameters`. PEFT has no patterns for them: they have one rank."""
_EXPERTS_OF_OLD = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""How the layers of experts were called when each expert was a module (transformers 4)."""
_MERGE = "use `sparse-zero merge`"


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """Write the ranks that the weights need, with a scaling of 1.

    Raises UserError: PEFT's LoRA does not adapt one of the parameters, or the factors are larger than the weights.
    """
    architecture = architecture_for(adapter)
    kinds = {name: _kind(name, adapter, architecture) for name in (*adapter.deltas, *adapter.rows)}
    if not kinds:
        raise UserError(f"no weight has selected scalars, but {TITLE} needs at least one; {_MERGE}")
    _check_whole(adapter, architecture)
    factored = {name: _factored(name, kind, adapter, architecture) for name, kind in kinds.items()}
    ranks = _ranks(kinds, factored)
    _check_size(factored, ranks)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in factored.items():
        tensors |= _tensors(name, kinds, weight.factors(ranks[name]), architecture)
    peft_files.write(adapter, directory, tensors, _method(kinds, ranks))
    return {
        "smallest_rank": min(ranks.values()),
        "largest_rank": max(ranks.values()),
        "lora_bytes": (directory / WEIGHTS_NAME).stat().st_size,
        "serving": _serving(adapter, kinds, max(ranks.values())),
    }


def _kind(name: str, adapter: Adapter, architecture: Architecture) -> Kind:
    """How PEFT adapts a parameter. Raises UserError if it does not."""
    target = architecture.targets[name]
    (module, held), *others = target.owners
    if others:
        owners = " and ".join(type(owner).__name__ for owner, _ in target.owners)
        raise UserError(f"'{name}' is tied ({owners}): PEFT would adapt only one of them, or merge it twice; {_MERGE}")
    if any(name.startswith(f"{whole}.") for whole in architecture.modules(adapter.whole)):
        raise UserError(f"'{name}' is in a fully trained module, where {TITLE} does not adapt it; {_MERGE}")
    # A subclass with a forward of its own, such as a router, may return something else than a product
    is_product = type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"
    if held == "weight" and isinstance(module, nn.Linear) and is_product:
        return "parameter" if name.split(".")[-2] in _renamed(architecture) else "linear"
    if held == "weight" and isinstance(module, Conv1D):
        return "conv1d"
    # A subclass may look up other rows than its input's, and PEFT would not. Gemma's scales the rows, and PEFT does.
    if held == "weight" and isinstance(module, nn.Embedding):
        if type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale"):
            return "embedding"
    elif len(target.shape) == 3 and target.shape[0] > 1 and is_linear(module):
        return "experts"
    raise UserError(
        f"'{name}' ({type(module).__name__}) is not the weight of a linear layer, an embedding or experts, which "
        f"{TITLE} requires; {_MERGE}"
    )


def _renamed(architecture: Architecture) -> Collection[str]:
    """The names of modules that PEFT replaces in `target_modules` by the experts' parameters, of dense layers too."""
    try:
        tables = importlib.import_module("peft.utils.transformers_weight_conversion")
        older = tables._MODEL_TO_CONVERSION_PATTERN.get(getattr(architecture.config, "model_type", None))
        return tables._MOE_TARGET_MODULE_MAPPING.get(older, ()) if older in tables._MOE_FUSED_TARGETS else ()
    except (ImportError, AttributeError):  # without PEFT, or with one that has no such tables
        modules = {id(module): module for target in architecture.targets.values() for module, _ in target.owners}
        return _EXPERTS_OF_OLD if any(map(is_experts, modules.values())) else ()


def _check_whole(adapter: Adapter, architecture: Architecture) -> None:
    for name in adapter.whole:
        if len(architecture.targets[name].owners) > 1:
            raise UserError(f"'{name}' is tied and fully trained: PEFT would untie it; {_MERGE}")


def _factored(name: str, kind: Kind, adapter: Adapter, architecture: Architecture) -> Factored:
    flat, values = _changes(name, adapter, architecture)
    target = architecture.targets[name]
    matrices, rows, columns = target.matrices
    matrix, inside = flat // (rows * columns), flat % (rows * columns)
    row, column = inside // columns, inside % columns
    if kind in ("conv1d", "embedding") or (kind == "experts" and _is_transposed(target)):
        return Factored((matrices, columns, rows), (matrix, column, row), values)
    return Factored((matrices, rows, columns), (matrix, row, column), values)


def _is_transposed(target: Target) -> bool:
    """Whether the matrices of experts are (in, out). PEFT asks the module for it."""
    return getattr(target.owners[0][0], "is_transposed", False)


def _changes(name: str, adapter: Adapter, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of a weight, int64 (n,), and the differences (n,). For fully trained rows it reads the base."""
    flat = adapter.positions(name)
    if name not in adapter.rows:
        return flat, adapter.deltas[name]
    selection, config = adapter.selection(name), adapter.config
    known = architecture.shape(name)[0]
    if selection.shape[0] > known:
        raise UserError(
            f"'{name}' has {selection.shape[0] - known} rows of new tokens, which the base model does not have, and "
            f"{TITLE} cannot add; {_MERGE}"
        )
    base = ModelWeights.open(config.base_model_name_or_path, config.revision, architecture).require([name])
    rows = difference(base.tensor(name)[list(selection.whole_rows)], adapter.rows[name])
    inside, values = row_mask(selection, flat), rows.new_zeros(flat.numel())
    values[inside] = rows.flatten()
    if name in adapter.deltas:
        values[~inside] = adapter.deltas[name].to(values.dtype)
    return flat, values


def _ranks(kinds: dict[str, Kind], factored: dict[str, Factored]) -> dict[str, int]:
    """The rank of each weight. Those that are adapted as parameters have the same."""
    ranks = {name: weight.rank for name, weight in factored.items()}
    common = max((rank for name, rank in ranks.items() if kinds[name] in _PARAMETERS), default=0)
    return {name: common if kinds[name] in _PARAMETERS else rank for name, rank in ranks.items()}


def _check_size(factored: dict[str, Factored], ranks: dict[str, int]) -> None:
    """Raise UserError if the factors are larger than the weights, as those of scattered positions are."""
    scalars = sum(weight.size[0] * ranks[name] * sum(weight.size[1:]) for name, weight in factored.items())
    dense = sum(torch.Size(weight.size).numel() for weight in factored.values())
    if scalars > dense:
        name, worst = max(factored.items(), key=lambda item: item[1].rank / min(item[1].size[1:]))
        raise UserError(
            f"as LoRA the adapter would have {scalars:,} scalars, more than the {dense:,} of the weights themselves: "
            f"its positions lie in too many columns (those of '{name}', {worst.size[1]} x {worst.size[2]}, need rank "
            f"{worst.rank}); train with fewer columns (sparse.columns), or {_MERGE}"
        )


def _tensors(
    name: str, kinds: dict[str, Kind], factors: tuple[torch.Tensor, torch.Tensor], architecture: Architecture
) -> dict[str, torch.Tensor]:
    """The factors A (E, r, in) and B (E, out, r) of a weight by their names in PEFT, without its prefix."""
    factor_a, factor_b = factors
    layer, _, held = name.rpartition(".")
    if kinds[name] == "embedding":
        return {f"{layer}.lora_embedding_A": factor_a[0], f"{layer}.lora_embedding_B": factor_b[0]}
    if kinds[name] == "experts":
        # PEFT wraps the module once for each of its parameters: the last one is outermost
        own = [key for key, _ in architecture.model.get_submodule(layer).named_parameters(recurse=False)]
        outside = [key for key in own[own.index(held) + 1 :] if f"{layer}.{key}" in kinds]
        layer += ".base_layer" * len(outside)
    a, b = factor_a.flatten(0, 1), factor_b.permute(1, 2, 0).flatten(1)
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


def _method(kinds: dict[str, Kind], ranks: dict[str, int]) -> dict[str, Any]:
    """The fields of the config that LoRA adds."""
    parameters = [name for name, kind in kinds.items() if kind in _PARAMETERS]
    names = {name: name.removesuffix(".weight") for name in kinds}
    common = max(ranks[name] for name in (parameters or names))
    # PEFT searches a pattern at the end of a name: ^ excludes longer names
    patterns = {f"^{re.escape(names[name])}": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds.values(),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": [module for name, module in names.items() if name not in parameters],
        "target_parameters": parameters or None,
    }


def _serving(adapter: Adapter, kinds: dict[str, Kind], rank: int) -> str:
    """What vLLM needs to serve it."""
    if adapter.whole:
        return f"vLLM does not load parameters trained in full ('{next(iter(adapter.whole))}'); {_MERGE} for it"
    if other := [name for name, kind in kinds.items() if kind in ("embedding", *_PARAMETERS)]:
        return f"vLLM may not load '{other[0]}': it serves LoRA of linear layers"
    return f"vLLM needs --max-lora-rank {rank} or more"
