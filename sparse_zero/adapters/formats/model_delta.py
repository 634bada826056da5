"""A fine-tuned model as the difference from its base model. Tensors are compared one by one, in chunks of rows."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparse_zero.adapters.files import check_dtype
from sparse_zero.adapters.formats.architecture import Architecture, architecture_of, configuration
from sparse_zero.adapters.formats.base_model import check_size
from sparse_zero.adapters.formats.contents import Contents, SelectedScalars
from sparse_zero.adapters.formats.deltas import difference
from sparse_zero.adapters.formats.model_weights import ModelWeights, count_tensors, has_weights, row_chunks
from sparse_zero.adapters.reading import class_name_of, read_json
from sparse_zero.adapters.schema import checked_settings
from sparse_zero.data.models import load_tokenizer, task_of
from sparse_zero.errors import UserError

TITLE = "a fine-tuned model"
WHOLE_ABOVE = 0.5
"""A weight of which a larger fraction of scalars differs is saved fully: positions need as much space as values."""

MAX_DENSITY = 0.5
"""The default maximum for the fraction of a model's scalars that differ."""


def matches(directory: Path) -> bool:
    return (directory / "config.json").is_file() and has_weights(directory)


def read(directory: Path, base: str | None, max_density: float = MAX_DENSITY) -> Contents:
    """Read a fine-tuned model.

    Args:
        directory: the fine-tuned model.
        base: the model that was fine-tuned.
        max_density: raise UserError if a larger fraction of the scalars differs.
    """
    if base is None:
        raise UserError(f"{directory}: is a model, not an adapter; pass the model that was fine-tuned with --base")
    path = directory / "config.json"
    content = read_json(path)
    settings, class_name = checked_settings(content, path), class_name_of(content, path)
    config, known = configuration(directory), count_tensors(directory)
    architecture = architecture_of(directory, base, class_name=class_name, config=config, known=known)
    check_size(directory, architecture)
    tuned = ModelWeights.open(str(directory), None, architecture).require(architecture.targets)
    original = ModelWeights.open(base, None, architecture)
    _check_buffers(architecture, tuned, original)
    found = _Differences()
    for name, target in architecture.targets.items():
        _compare(name, tuple(target.shape), tuned, original, found)
    _check_density(directory, base, found, architecture.total, max_density)
    added = [row for rows, _ in found.rows.values() for row in rows]
    return Contents(
        origin=directory,
        format="model",
        base=base,
        selected=found.selected,
        whole={name: tuned.tensor(name) for name in found.whole},
        rows=found.rows,
        task=task_of(class_name),
        class_name=class_name,
        dtype=architecture.dtype,
        rule="every scalar that differs from the base model",
        settings=settings,
        config=config,
        known=known,
        new_tokens=_tokens(directory, added),
        notes=[*dict.fromkeys([*tuned.notes, *original.notes]), *found.notes],
    )


@dataclass
class _Differences:
    selected: dict[str, SelectedScalars] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each weight in both models: the number of scalars that differ, and of all scalars."""
    notes: list[str] = field(default_factory=list)


def _compare(
    name: str,
    shape: tuple[int, ...],
    tuned: ModelWeights,
    original: ModelWeights,
    found: _Differences,
) -> None:
    if original.key(name) is None:
        found.whole.append(name)
        found.notes.append(f"'{name}' is saved fully: the base model does not have it")
        return
    architecture, before, found_shape = tuned.architecture, original.shape(name), tuned.shape(name)
    if found_shape != shape:
        raise UserError(
            f"{tuned.directory}: damaged: '{name}' has shape {list(found_shape)} instead of {list(shape)}, which "
            "config.json requires"
        )
    vocabulary = getattr(architecture.config.get_text_config(), "vocab_size", None)
    grown = len(shape) == 2 and shape[0] == vocabulary and before[0] < shape[0] and before[1:] == shape[1:]
    if before != shape and not grown:
        if not name.startswith(architecture.prefix):
            # A head for other labels than the base model's
            found.whole.append(name)
            found.notes.append(f"'{name}' is saved fully: it has shape {list(before)} in the base model")
            return
        raise UserError(
            f"{tuned.directory}: '{name}' has shape {list(shape)}, but {list(before)} in {original.directory}; pass "
            "the model that was fine-tuned with --base"
        )
    positions, values, size, changed = [], [], torch.Size(before).numel(), 0
    width = torch.Size(before[1:]).numel()
    for start, stop in row_chunks(before):
        new, old = tuned.rows(name, start, stop).flatten(), original.rows(name, start, stop).flatten()
        check_dtype(tuned.directory, name, new)
        check_dtype(original.directory, name, old)
        flat = (new != old).nonzero().squeeze(1)
        changed += flat.numel()
        # Not needed for a weight that will be saved fully
        if changed <= WHOLE_ABOVE * size:
            positions.append(flat + start * width)
            values.append(difference(old[flat], new[flat]))
    found.changed[name] = changed, size
    if changed > WHOLE_ABOVE * size:
        found.whole.append(name)
        found.notes.append(f"'{name}' is saved fully: {100 * changed / size:.0f}% of its scalars differ")
        return
    if changed:
        found.selected[name] = SelectedScalars(torch.cat(positions), torch.cat(values))
    if grown:
        found.rows[name] = tuple(range(before[0], shape[0])), tuned.rows(name, before[0], shape[0])


def _check_density(directory: Path, base: str, found: _Differences, total: int, max_density: float) -> None:
    if not (found.selected or found.whole or found.rows):
        raise UserError(f"{directory}: has the same weights as {base}, so there is nothing to convert")
    changed = sum(count for count, _ in found.changed.values())
    if changed > max_density * total:
        raise UserError(
            f"{directory}: {100 * changed / total:.0f}% of its scalars differ from {base}, more than "
            f"{100 * max_density:g}%: an adapter would be about as large as the model; use the model itself, "
            "or convert it anyway with --max-density 1"
        )


def _check_buffers(architecture: Architecture, tuned: ModelWeights, original: ModelWeights) -> None:
    """Raise UserError if buffers differ (e.g. the statistics of a batch norm): an adapter cannot contain them."""
    for name in architecture.model.state_dict().keys() - {a for names in architecture.aliases.values() for a in names}:
        stored = tuned.key(name) is not None and original.key(name) is not None
        if not stored:
            continue
        new, old = tuned.tensor(name), original.tensor(name)
        if new.dtype != old.dtype or not torch.equal(new, old):
            raise UserError(f"{tuned.directory}: the buffer '{name}' differs, but adapters contain parameters only")


def _tokens(directory: Path, rows: list[int]) -> list[str]:
    if not rows or not (directory / "tokenizer_config.json").is_file():
        return []
    return load_tokenizer(str(directory)).convert_ids_to_tokens(sorted(set(rows)))
