"""What an adapter's directory holds, whatever its format: positions and values by the base model's parameter names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_zero.adapters.files import Adapter, AdapterConfig, SelectedTensor, library_versions
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.model.fingerprint import fingerprint
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import STORED, STRATIFIED, Selection, row_positions

if TYPE_CHECKING:
    from sparse_zero.adapters.exchange.architecture import Architecture


@dataclass
class Selected:
    """Some scalars of one weight."""

    indices: torch.Tensor
    """Integers: (n,) into the flattened weight, or (n, dimensions), one coordinate for each dimension."""
    values: torch.Tensor
    """(n,)"""
    shape: tuple[int, ...] | None = None
    """Of the weight; None where the files do not tell."""


@dataclass
class Contents:
    """One directory, read without its base model (and without importing transformers) unless the format needs it."""

    origin: Path
    format: str
    """By name, as in `sparse_zero.adapters.exchange`."""
    base: str | None
    selected: dict[str, Selected]
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parameters that were trained whole: their values."""
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    """Rows of a matrix that were trained whole: which, and their values (rows, columns)."""
    revision: str | None = None
    task: str | None = None
    dtype: str | None = None
    """Of the base model."""
    rule: str = "stored"
    """How the scalars were selected, for people."""
    sparse: dict[str, Any] = field(default_factory=dict)
    """What the directory tells of SparseConfig."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Entries of the model's configuration that the task needs (id2label, pad_token_id)."""
    new_tokens: list[str] = field(default_factory=list)
    class_name: str | None = None
    """Of the transformers model, where the directory says it."""
    config: Any = None
    """The base model's configuration, where the directory carries it."""
    results: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    total: int | None = None
    """Scalars of the base model, where the directory says it."""
    own: Adapter | None = None
    """The same, where it was one of ours."""
    notes: list[str] = field(default_factory=list)
    """What a user must know of how this was read."""

    @property
    def trained(self) -> int:
        """How many scalars."""
        selected = sum(entry.values.numel() for entry in self.selected.values())
        whole = sum(values.numel() for values in self.whole.values())
        return selected + whole + sum(values.numel() for _, values in self.rows.values())

    def architecture(self) -> "Architecture":
        """Of the base model. Raises UserError: it cannot be found."""
        from sparse_zero.adapters.exchange.architecture import architecture_of

        return architecture_of(
            self.origin,
            self.base,
            self.revision,
            self.task,
            self.class_name,
            self.settings | _labels(self.whole, self.settings),
            self.config,
        )

    def adapter(self) -> Adapter:
        """The same as an adapter of our own. Raises UserError where it does not fit its base model."""
        if self.own is not None:
            return self.own
        architecture = self.architecture()
        deltas, stored, tensors = {}, {}, {}
        for name in [*self.selected, *(name for name in self.rows if name not in self.selected)]:
            shape = self._shape(name, architecture)
            rows = self.rows[name][0] if name in self.rows else ()
            flat = torch.zeros(0, dtype=torch.int64)
            if name in self.selected:
                flat, deltas[name] = _sorted(self.origin, name, self.selected[name], shape)
            if not rows:
                stored[name], selection = flat, Selection(STORED, name, shape, flat.numel())
            elif flat.numel():
                stored[name] = torch.cat([flat, row_positions(torch.tensor(rows), shape[-1])]).sort().values
                selection = Selection(STORED, name, shape, stored[name].numel(), whole_rows=rows)
            else:
                selection = Selection(STRATIFIED, name, shape, len(rows) * shape[-1], whole_rows=rows)
            tensors[name] = SelectedTensor.describe(
                selection, stored[name] if name in stored else selection.positions()
            )
        if not self.trained:
            raise UserError(f"{self.origin}: holds no trained scalar")
        for name, values in self.whole.items():
            self._check_whole(name, values, architecture)
        return Adapter(
            config=self._config(architecture, tensors),
            deltas=deltas,
            whole={name: values.contiguous() for name, values in self.whole.items()},
            rows={name: values.contiguous() for name, (_, values) in self.rows.items()},
            stored=stored,
        )

    def _shape(self, name: str, architecture: "Architecture") -> tuple[int, ...]:
        """The weight's shape, with room for its new rows."""
        expected = architecture.shape(name)
        if expected is None:
            raise UserError(
                f"{self.origin}: '{name}' is no parameter of {architecture.class_name} "
                f"({architecture.source}){did_you_mean(name, architecture.targets)}; --base names another base model"
            )
        if name in self.rows:
            return (max(expected[0], max(self.rows[name][0]) + 1), *expected[1:])
        shape = self.selected[name].shape or expected
        if shape != expected:
            raise UserError(
                f"{self.origin}: '{name}' has shape {list(shape)}, and {list(expected)} in {architecture.source}; "
                "--base names the right base model"
            )
        return expected

    def _check_whole(self, name: str, values: torch.Tensor, architecture: "Architecture") -> None:
        expected = architecture.shape(name)
        # Embeddings may have been given more rows than the base model has.
        if expected is None or tuple(values.shape[1:]) != expected[1:] or values.shape[0] < expected[0]:
            there = "no such parameter" if expected is None else f"shape {list(expected)}"
            raise UserError(
                f"{self.origin}: '{name}' has shape {list(values.shape)}, and {architecture.class_name} of "
                f"{architecture.source} has {there}; --base names the right base model"
            )

    def _config(self, architecture: "Architecture", tensors: dict[str, SelectedTensor]) -> AdapterConfig:
        from sparse_zero.adapters.exchange.checkpoint import Checkpoint

        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        shapes |= {name: list(values.shape) for name, values in self.whole.items()}
        grown = sum(torch.Size(shape).numel() - architecture.targets[n].shape.numel() for n, shape in shapes.items())
        total = architecture.total + grown
        base = Checkpoint.at_hand(self.base, self.revision, architecture)
        sparse = {
            "density": self.trained / total,
            "targets": list(tensors) or None,
            "modules_to_save": list(architecture.modules(self.whole)),
            "trainable_token_indices": sorted({row for rows, _ in self.rows.values() for row in rows}) or None,
        }
        return AdapterConfig(
            base_model_name_or_path=self.base,
            revision=self.revision,
            base_fingerprint=fingerprint(base, {*self.whole, *self.rows}) if base else {},
            new_tokens=self.new_tokens,
            task=self.task or architecture.task,
            dtype=self.dtype or architecture.dtype or "float32",
            model_settings=self.settings | _labels(self.whole, self.settings | architecture.labels),
            sparse=SparseConfig(**sparse | self.sparse),
            total_parameters=total,
            trainable_parameters=self.trained,
            tensors=tensors,
            modules_to_save=list(self.whole),
            results=self.results,
            library_versions=library_versions() | self.versions,
        )


_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def _labels(whole: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Names for a head's labels, where nobody says how they are called."""
    heads = [whole[name] for name in _HEADS if name in whole]
    if not heads or len(known.get("id2label", ())) == len(heads[0]):
        return {key: known[key] for key in ("id2label", "label2id") if key in known}
    labels = {index: f"LABEL_{index}" for index in range(len(heads[0]))}
    return {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}


def _sorted(origin: Path, name: str, entry: Selected, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in increasing order, and the values in the same order. Raises UserError: they do not fit."""
    indices, size = entry.indices.to(torch.int64), torch.Size(shape).numel()
    fits = indices.dim() in (1, 2) and entry.values.dim() == 1 and len(indices) == len(entry.values)
    if indices.dim() == 2 and fits:
        fits = indices.shape[1] == len(shape) and bool((indices < torch.tensor(shape)).all() and (indices >= 0).all())
        flat = torch.zeros(len(indices), dtype=torch.int64)
        for dimension, length in enumerate(shape if fits else ()):
            flat = flat * length + indices[:, dimension]
    else:
        flat = indices
        fits = fits and bool((flat < size).all() and (flat >= 0).all())
    if not fits:
        raise UserError(
            f"{origin}: the indices of '{name}' do not fit a weight of shape {list(shape)}: the file is damaged, "
            "or made for another base model (--base names it)"
        )
    flat, order = flat.sort()
    if bool((flat.diff() == 0).any()):
        raise UserError(f"{origin}: damaged: '{name}' has the same position twice")
    return flat, entry.values[order].contiguous()
