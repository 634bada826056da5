"""`sparse-zero inspect`: facts about an adapter of any format. The base model is read only if that is necessary."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparse_zero.adapters.files import adapter_bytes, check_drawing
from sparse_zero.adapters.formats import format_module, read
from sparse_zero.adapters.formats.contents import Contents
from sparse_zero.data.gguf import is_on_this_machine
from sparse_zero.errors import UserError
from sparse_zero.model.finite import describe as describe_counts

SMALLEST = -8
"""The histogram has one bin for all magnitudes below this power of ten. They are negligible for any weight."""

LARGEST = 10
"""Number of the largest changes that are listed."""


def describe(directory: str | Path, base: str | None = None) -> dict[str, Any]:
    """Facts about an adapter and each of its tensors.

    Args:
        directory: an adapter of any format, or a fine-tuned model.
        base: the base model's directory or hub id. Needed for a fine-tuned model, and for an adapter whose positions
            depend on the base model's weights.

    Raises:
        UserError: the format is not known, or a file is damaged.
    """
    contents = read(directory, base)
    _add_shapes(contents)
    _draw(contents)
    tensors = list(_tensors(contents))
    changes = {name: finite(entry.values) for name, entry in contents.selected.items()}
    if counts := contents.not_finite():
        contents.notes.append(f"NaN or infinite: {describe_counts(counts)}")
    size = adapter_bytes(directory)
    facts = {
        "format": format_module(contents.format).TITLE,
        "base_model": contents.base,
        "revision": contents.revision,
        "task": contents.task,
        "dtype": contents.dtype,
        "base_quantised_to": _quantized(contents),
        "selection": contents.rule,
        "trainable_parameters": contents.trained,
        "total_parameters": contents.total,
        "density": contents.trained / contents.total if contents.total else None,
        "bytes": size,
        "bytes_per_scalar": size / max(1, contents.trained),
        "new_tokens": contents.new_tokens,
        "norm": _norm(changes.values()),
        "library_versions": contents.versions,
        "results": contents.results,
        "notes": contents.notes,
    }
    if contents.format == "model":
        # The size of the whole model says nothing about its changes
        del facts["bytes"], facts["bytes_per_scalar"]
    return facts | {
        "kinds": _grouped(tensors, _kind),
        "layers": _grouped(tensors, _layer),
        "histogram": histogram(changes.values()),
        "largest": _largest(contents),
        "tensors": tensors,
    }


def _quantized(contents: Contents) -> dict[str, str] | None:
    """What weights of the base model were quantised to in training, and how many."""
    kinds = {} if contents.own is None else contents.own.config.quantized
    return {kind: f"({len(names):,} weights)" for kind, names in kinds.items()} or None


def _add_shapes(contents: Contents) -> None:
    """Add the shapes of the weights if the directory does not have them and the base model is available locally."""
    if contents.total is not None:
        return
    try:
        if contents.config is None and not (contents.base and is_on_this_machine(contents.base)):
            return
        architecture = contents.architecture()
    except UserError as error:
        contents.notes.append(f"the shapes of the weights are unknown ({error})")
        return
    contents.total = architecture.total
    for name, entry in contents.selected.items():
        entry.shape = entry.shape or architecture.shape(name)


def _draw(contents: Contents) -> None:
    """Draw and check the positions of an adapter of rules, unless that takes too long for a description."""
    if contents.own is None:
        return
    try:
        check_drawing(contents.own, contents.origin)
    except UserError as error:
        contents.notes.append(str(error))
        return
    for name in contents.selected:
        contents.draw(name)


def finite(values: torch.Tensor) -> torch.Tensor:
    """The values that are neither NaN nor infinite: float32 or float64 (n,)."""
    values = values.flatten() if values.dtype == torch.float64 else values.flatten().float()
    return values[values.isfinite()]


def _tensors(contents: Contents) -> Iterable[dict[str, Any]]:
    for name, entry in contents.selected.items():
        size = torch.Size(entry.shape).numel() if entry.shape else None
        yield _entry(name, "selected", entry.values, entry.shape, entry.values.numel() / size if size else None)
    for name, (_, values) in contents.rows.items():
        yield _entry(name, "rows", values, tuple(values.shape), None)
    for name, values in contents.whole.items():
        yield _entry(name, "whole", values, tuple(values.shape), 1.0)


def _entry(
    name: str, trained: str, values: torch.Tensor, shape: tuple[int, ...] | None, density: float | None
) -> dict[str, Any]:
    scalars, values = values.numel(), finite(values)
    return {
        "name": name,
        "shape": list(shape) if shape else None,
        "trained": trained,
        "scalars": scalars,
        "density": density,
        "norm": values.norm().item(),
        "largest": values.abs().max().item() if values.numel() else 0.0,
        "zeros": int((values == 0).sum()),
        **({"not_finite": scalars - values.numel()} if values.numel() < scalars else {}),
    }


def _kind(name: str) -> str:
    """The name with layer numbers replaced, the same for a weight of all layers."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _layer(name: str) -> str:
    """The name up to the first number, as `model.layers.3`; the whole name outside of the layers."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found.group() if found else name


def _grouped(tensors: list[dict[str, Any]], group: Any) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in tensors:
        key = group(tensor["name"]), tensor["trained"]
        row = rows.setdefault(
            key, {"name": key[0], "trained": key[1], "weights": 0, "scalars": 0, "norm": 0.0, "largest": 0.0}
        )
        row["weights"] += 1
        row["scalars"] += tensor["scalars"]
        row["norm"] = (row["norm"] ** 2 + tensor["norm"] ** 2) ** 0.5
        row["largest"] = max(row["largest"], tensor["largest"])
    return list(rows.values())


def histogram(changes: Iterable[torch.Tensor]) -> list[dict[str, Any]]:
    """Count the deltas with a magnitude in [10^k, 10^(k+1)), including empty ranges between others.

    The first bin is for zeros (`from` and `to` are 0), the next for all magnitudes below 10^SMALLEST.
    """
    zeros, decades = 0, Counter()
    for values in changes:
        magnitude = values.abs().double()
        zeros += int((magnitude == 0).sum())
        found, numbers = magnitude[magnitude > 0].log10().floor().long().unique(return_counts=True)
        for decade, number in zip(found.tolist(), numbers.tolist(), strict=True):
            decades[max(decade, SMALLEST - 1)] += number
    bars = [{"from": 0.0, "to": 0.0, "scalars": zeros}] if zeros else []
    for decade in range(min(decades), max(decades) + 1) if decades else ():
        least = 0.0 if decade < SMALLEST else 10.0**decade
        bars.append({"from": least, "to": 10.0 ** (decade + 1), "scalars": decades[decade]})
    return bars


def _largest(contents: Contents) -> list[dict[str, Any]]:
    found = []
    for name, entry in contents.selected.items():
        magnitudes = entry.values.double().abs().nan_to_num(nan=0.0, posinf=0.0)
        top = magnitudes.topk(min(LARGEST, entry.values.numel())).indices
        for place in top.tolist():
            if magnitudes[place] == 0:
                continue
            if entry.indices is None:
                found.append({"name": name, "position": None, "delta": entry.values[place].item()})
                continue
            index = entry.indices[place]
            if index.dim() == 0 and entry.shape and 0 <= index < torch.Size(entry.shape).numel():
                position = [int(x) for x in torch.unravel_index(index.long(), entry.shape)]
            else:
                position = index.reshape(-1).tolist()
            found.append({"name": name, "position": position, "delta": entry.values[place].item()})
    return sorted(found, key=lambda change: -abs(change["delta"]))[:LARGEST]


def _norm(changes: Iterable[torch.Tensor]) -> float:
    return sum(values.norm().item() ** 2 for values in changes) ** 0.5
