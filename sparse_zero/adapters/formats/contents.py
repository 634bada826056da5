"""The contents of an adapter directory of any format: positions and values by the base model's parameter names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from sparse_zero.adapters.files import Adapter, check_dtype, checked_positions, library_versions, row_mask
from sparse_zero.adapters.schema import AdapterConfig, SelectedTensor, reason_of
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.model.fingerprint import fingerprint
from sparse_zero.model.finite import count_not_finite
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.draws import STRATIFIED, row_positions
from sparse_zero.selection.rules import STORED, Selection

if TYPE_CHECKING:
    from sparse_zero.adapters.formats.architecture import Architecture


@dataclass
class SelectedScalars:
    """The selected scalars of one weight."""

    indices: torch.Tensor | None
    """Integers: indices (n,) into the flattened weight, or coordinates (n, dimensions). None if a rule draws them; see
    `Contents.draw`."""
    values: torch.Tensor
    """The deltas (n,)."""
    shape: tuple[int, ...] | None = None
    """The weight's shape; None if the files do not contain it."""
    rows: int | None = None
    """The first dimension of the shape, if the files contain only that."""


@dataclass
class Contents:
    """The contents of a directory, read without the base model and transformers unless the format needs them."""

    origin: Path
    format: str
    """The name of the format, as in `sparse_zero.adapters.formats`."""
    base: str | None
    selected: dict[str, SelectedScalars]
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    """The values of fully trained parameters."""
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    """The fully trained rows of a matrix: their indices, and their values (rows, columns)."""
    revision: str | None = None
    task: str | None = None
    dtype: str | None = None
    """The dtype of the base model."""
    rule: str = "stored"
    """How the scalars were selected, for display."""
    sparse: dict[str, Any] = field(default_factory=dict)
    """The fields of SparseConfig that the directory determines."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Entries of the model's config that the task sets (id2label, pad_token_id)."""
    new_tokens: list[str] = field(default_factory=list)
    class_name: str | None = None
    """The model's class in transformers, if the directory names it."""
    config: Any = None
    """The base model's config, if the directory has a copy."""
    results: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    known: int = 0
    """Number of parameters of the base model that the directory names; 0 if it names only some of them."""
    total: int | None = None
    """Number of scalars of the base model, if known."""
    own: Adapter | None = None
    """The adapter, if it has the sparse-zero format."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user on how the directory was read."""

    @property
    def trained(self) -> int:
        """Number of trained scalars."""
        selected = sum(entry.values.numel() for entry in self.selected.values())
        whole = sum(values.numel() for values in self.whole.values())
        return selected + whole + sum(values.numel() for _, values in self.rows.values())

    def not_finite(self) -> dict[str, int]:
        """The number of values that are NaN or infinite, by name, without zeros."""
        selected = ((name, entry.values) for name, entry in self.selected.items())
        rows = ((name, values) for name, (_, values) in self.rows.items())
        return count_not_finite([*selected, *rows, *self.whole.items()])

    def check_tensors(self) -> None:
        """Check dtypes and dimensions. Raises UserError."""
        for name, entry in self.selected.items():
            check_dtype(self.origin, name, entry.values)
            if entry.values.dim() != 1:
                raise UserError(
                    f"{self.origin}: damaged: the deltas of '{name}' have the shape {list(entry.values.shape)}"
                )
            if entry.indices is not None:
                entry.indices = as_indices(self.origin, name, entry.indices)
                if entry.indices.dim() not in (1, 2) or len(entry.indices) != len(entry.values):
                    raise UserError(f"{self.origin}: damaged: the indices of '{name}' are not valid for its values")
        for name, values in [*self.whole.items(), *((name, values) for name, (_, values) in self.rows.items())]:
            if values.is_floating_point() or values.is_complex() or self.own is None:
                check_dtype(self.origin, name, values)
        self.selected = {name: entry for name, entry in self.selected.items() if len(entry.values)}

    def draw(self, name: str) -> None:
        """Draw and check the indices of a weight. Raises UserError: see `checked_positions`."""
        entry = self.selected[name]
        if entry.indices is None:
            flat = checked_positions(self.own, name, self.origin)
            entry.indices = flat[~row_mask(self.own.selection(name), flat)] if name in self.rows else flat

    def architecture(self) -> "Architecture":
        """The architecture of the base model. Raises UserError if it is not found."""
        from sparse_zero.adapters.formats.architecture import architecture_of

        return architecture_of(
            self.origin,
            self.base,
            self.revision,
            self.task,
            self.class_name,
            self.settings | _labels(self.whole, self.settings),
            self.config,
            self.known,
        )

    def adapter(self) -> Adapter:
        """Convert to an `Adapter`. Raises UserError if the contents do not fit the base model."""
        if self.own is not None:
            return self.own
        try:
            return self._adapter()
        except ValidationError as error:
            raise UserError(f"{self.origin}: {reason_of(error)}") from None

    def _adapter(self) -> Adapter:
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
            tensors[name] = SelectedTensor.from_selection(
                selection, stored[name] if name in stored else selection.positions()
            )
        if not self.trained:
            raise UserError(f"{self.origin}: contains no trained scalars")
        for name, values in self.whole.items():
            self._check_whole(name, values, architecture)
        return Adapter(
            config=self._config(architecture, tensors),
            deltas=deltas,
            whole={name: values.contiguous() for name, values in self.whole.items()},
            rows={name: values.contiguous() for name, (_, values) in self.rows.items()},
            stored_positions=stored,
        )

    def _shape(self, name: str, architecture: "Architecture") -> tuple[int, ...]:
        """The weight's shape, including rows of new tokens."""
        expected = architecture.shape(name)
        if expected is None:
            raise UserError(
                f"{self.origin}: '{name}' is not a parameter of {architecture.class_name} "
                f"({architecture.source}){did_you_mean(name, architecture.targets)}; pass the right base model with "
                "--base"
            )
        if name in self.rows:
            return (max(expected[0], max(self.rows[name][0]) + 1), *expected[1:])
        shape, rows = self.selected[name].shape or expected, self.selected[name].rows
        if rows not in (None, expected[0]):
            raise UserError(
                f"{self.origin}: damaged: '{name}' has {rows} rows in the adapter and {expected[0]} in "
                f"{architecture.source}; if that is not its base model, pass the right one with --base"
            )
        if shape != expected:
            raise UserError(
                f"{self.origin}: '{name}' has shape {list(shape)} in the adapter and {list(expected)} in "
                f"{architecture.source}; pass the right base model with --base"
            )
        return expected

    def _check_whole(self, name: str, values: torch.Tensor, architecture: "Architecture") -> None:
        expected, shape = architecture.shape(name), tuple(values.shape)
        # With new tokens, embeddings have more rows than in the base model
        grown = expected and shape[1:] == expected[1:] and shape[:1] > expected[:1]
        if shape != expected and not grown:
            found = "no such parameter" if expected is None else f"shape {list(expected)}"
            raise UserError(
                f"{self.origin}: '{name}' has shape {list(values.shape)}, but {architecture.class_name} of "
                f"{architecture.source} has {found}; pass the right base model with --base"
            )

    def _config(self, architecture: "Architecture", tensors: dict[str, SelectedTensor]) -> AdapterConfig:
        from sparse_zero.adapters.formats.model_weights import ModelWeights

        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        shapes |= {name: list(values.shape) for name, values in self.whole.items()}
        grown = sum(torch.Size(shape).numel() - architecture.targets[n].shape.numel() for n, shape in shapes.items())
        total = architecture.total + grown
        base = ModelWeights.open_local(self.base, self.revision, architecture)
        for name in self.selected if base and self.config is not None else ():
            if base.key(name) and name not in self.rows and base.shape(name) != (claimed := architecture.shape(name)):
                raise UserError(
                    f"{self.origin}: '{name}' has shape {list(claimed)} in its copy of the config, but "
                    f"{list(base.shape(name))} in {self.base}; pass the right base model with --base"
                )
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
    """id2label and label2id of a head. Labels without known names are called LABEL_0, LABEL_1 and so on."""
    heads = [whole[name] for name in _HEADS if name in whole and whole[name].dim() == 2]
    if not heads or len(known.get("id2label", ())) == len(heads[0]):
        return {key: known[key] for key in ("id2label", "label2id") if key in known}
    labels = {index: f"LABEL_{index}" for index in range(len(heads[0]))}
    return {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}


def as_indices(origin: Path, name: str, indices: torch.Tensor) -> torch.Tensor:
    """Indices as int64. Raises UserError if they are not whole numbers."""
    whole = indices.to(torch.int64) if not indices.is_complex() and indices.dtype != torch.bool else None
    # Some programs save them as float32. Numbers beyond 64 bits become others.
    if whole is None or not torch.equal(whole.to(indices.dtype), indices):
        raise UserError(f"{origin}: damaged: the indices of '{name}' are not whole numbers")
    return whole


def _sorted(
    origin: Path, name: str, entry: SelectedScalars, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Increasing positions int64 (n,) and the values in the same order. Raises UserError if they are not valid."""
    indices, size, fits = entry.indices, torch.Size(shape).numel(), True
    if indices.dim() == 2:
        fits = indices.shape[1] == len(shape) and bool((indices < torch.tensor(shape)).all() and (indices >= 0).all())
        flat = torch.zeros(len(indices), dtype=torch.int64)
        for dimension, length in enumerate(shape if fits else ()):
            flat = flat * length + indices[:, dimension]
    else:
        flat = indices
        fits = bool((flat < size).all() and (flat >= 0).all())
    if not fits:
        raise UserError(
            f"{origin}: the indices of '{name}' are not valid for a weight of shape {list(shape)}: the file is "
            "damaged, or the adapter has another base model (pass it with --base)"
        )
    flat, order = flat.sort()
    if bool((flat.diff() == 0).any()):
        raise UserError(f"{origin}: damaged: the indices of '{name}' contain duplicates")
    return flat, entry.values[order].contiguous()
