"""How the deltas are added to the original values."""

from typing import NamedTuple


class Setting(NamedTuple):
    """How the deltas are added to the original values."""

    enabled: bool
    scale: float
    dropout_step: int | None
    """The number of the training forward whose dropout mask applies; None for no dropout."""
    is_reference: bool = False
    """Whether the values are those of the reference in place of the original ones; see `model.reference`."""


BASE = Setting(enabled=False, scale=1.0, dropout_step=None)
"""The original values."""
