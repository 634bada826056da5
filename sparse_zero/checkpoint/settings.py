"""The settings of a run, which a checkpoint stores, and how they differ from those of the run that resumes from it.

settings.json
    model, data, sparse, rpn    these sections of the recipe; absent if the run had no recipe
    training                    what TrainingArguments say about the numbers of a run, see `training.run_settings`
    examples                    count and checksum of the training examples, and first_step: since when they are used

Almost all settings are taken from the recipe at each start, so a change holds from the checkpoint on. But a checkpoint
restores the learning rate, and its place in the epoch is one in its own examples, in their order.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sparse_zero.checkpoint.directory import SETTINGS_NAME, Checkpoint
from sparse_zero.checkpoint.resume import DATA, LEARNING_RATE
from sparse_zero.errors import UserError

Settings = dict[str, Any]

_ORDER = ("train_sampling_strategy", "dataloader_drop_last")
_RESTORED_SCHEDULE = "reduce_lr_on_plateau"


@dataclass(frozen=True)
class Difference:
    """A setting that differs between a checkpoint and the run that resumes from it."""

    key: str
    saved: Any
    here: Any
    is_restored: bool
    """Whether the checkpoint's value is used."""


class _Training(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    learning_rate: float | None = Field(None, ge=0, allow_inf_nan=False)
    seed: int | None = None
    data_seed: int | None = None


class _Examples(BaseModel):
    model_config = ConfigDict(strict=True)

    count: int | None = None
    checksum: str | None = None
    first_step: int = Field(0, ge=0)


class _Stored(BaseModel):
    """What must be so in settings.json for the functions of this module."""

    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    sparse: dict[str, Any] | None = None
    rpn: dict[str, Any] | None = None
    training: _Training
    examples: _Examples


def read_settings(checkpoint: Checkpoint) -> Settings:
    """The settings of the run that saved a checkpoint. Of a checkpoint without settings, from version 0.1, only the
    learning rate is known.

    Raises UserError: the file is damaged.
    """
    if SETTINGS_NAME not in checkpoint.manifest.files:
        rates = (checkpoint.manifest.scheduler or {}).get("base_lrs")
        is_known = isinstance(rates, list) and rates and isinstance(rates[0], float)
        return {"training": {"learning_rate": rates[0]}} if is_known else {}
    path = checkpoint.directory / SETTINGS_NAME
    try:
        settings = json.loads(path.read_bytes())
        if _Stored.model_validate(settings).examples.first_step <= checkpoint.step:
            return settings
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(f"{path}: damaged; resume from another checkpoint")


def differences(saved: Settings, here: Settings, reset: Collection[str]) -> list[Difference]:
    """The settings that differ. A setting that only one of the two versions of the package knows does not count.

    Args: reset: see `resume.RESETS`.
    """
    found = []
    for section in here:
        if section == "examples" or section not in saved:
            continue
        if saved[section] is None or here[section] is None:
            if saved[section] != here[section]:
                found.append(Difference(section, saved[section], here[section], False))
            continue
        old, new = _flat(section, saved[section]), _flat(section, here[section])
        found += [Difference(key, old[key], new[key], False) for key in new if key in old and old[key] != new[key]]
    restored = set() if LEARNING_RATE in reset else {"training.learning_rate"}
    if restored and saved.get("training", {}).get("lr_scheduler_type") == _RESTORED_SCHEDULE:
        restored.add("training.lr_scheduler_kwargs")
    return [Difference(d.key, d.saved, d.here, _parent(d.key, restored) in restored) for d in found]


def _flat(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(f"{prefix}.{key}", value)
        else:
            flat[f"{prefix}.{key}"] = value
    return flat


def _parent(key: str, keys: Collection[str]) -> str:
    return next((known for known in keys if key.startswith(f"{known}.")), key)


def check_settings(checkpoint: Checkpoint, saved: Settings, here: Settings, reset: Collection[str]) -> None:
    """Raises UserError: a run with the settings `here` cannot resume from a checkpoint in a way that is right."""
    training, before = here.get("training", {}), saved.get("training", {})
    steps = training.get("max_steps", -1)
    if 0 < steps < checkpoint.step:
        raise UserError(
            f"training.max_steps: {steps}, but {checkpoint.directory} is of step {checkpoint.step}; train more steps, "
            "or resume from an earlier checkpoint"
        )
    schedules = [each.get("lr_scheduler_type") for each in (before, training)]
    is_other = None not in schedules and len(set(schedules)) == 2 and _RESTORED_SCHEDULE in schedules
    if is_other and LEARNING_RATE not in reset:
        raise UserError(
            f"training.lr_scheduler_type: {checkpoint.directory} was saved with {schedules[0]}, whose state means "
            f"nothing to {schedules[1]}; restore it, or take the new rate and schedule with --reset {LEARNING_RATE}"
        )
    if DATA not in reset and (changes := _changes_of_data(saved, here)):
        raise UserError(
            f"{checkpoint.directory}: was saved in the middle of other training examples, or of another order of them "
            f"({'; '.join(changes)}), in which its place in the epoch is not the same; restore them, or take the "
            f"recipe's from their beginning with --reset {DATA}"
        )


def _changes_of_data(saved: Settings, here: Settings) -> list[str]:
    """What makes another sequence of training examples."""
    changes = []
    old, new = saved.get("examples", {}), here.get("examples", {})
    if None not in (counts := (old.get("count"), new.get("count"))) and counts[0] != counts[1]:
        changes.append(f"{counts[0]} training examples, now {counts[1]}")
    if None not in (sums := (old.get("checksum"), new.get("checksum"))) and sums[0] != sums[1]:
        changes.append("their contents")
    if changes:
        keys = [f"{d.key}: {_shown(d.saved)}, now {_shown(d.here)}" for d in differences(saved, here, ())]
        changes += [change for change in keys if change.startswith(("data.", "model."))]
    before, now = saved.get("training", {}), here.get("training", {})
    if "seed" in before and before.get("train_sampling_strategy") != "sequential":
        (_, old_seed), (key, new_seed) = _seed_of_order(before), _seed_of_order(now)
        if old_seed != new_seed:
            changes.append(f"training.{key}: {old_seed}, now {new_seed}")
    changes += [
        f"training.{key}: {before[key]}, now {now[key]}" for key in _ORDER if key in before and before[key] != now[key]
    ]
    return changes


def _seed_of_order(training: Mapping[str, Any]) -> tuple[str, int]:
    key = "seed" if training.get("data_seed") is None else "data_seed"
    return key, training[key]


def settings_table(found: list[Difference]) -> str:
    """The differences as a table of text, with what is used."""
    rows = [("setting", "checkpoint", "now", "used")]
    for each in found:
        used = f"the checkpoint's; --reset {LEARNING_RATE} takes the new one" if each.is_restored else "the new one"
        rows.append((each.key, _shown(each.saved), _shown(each.here), used))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, dict):
        return "none" if not value else "set"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
