"""What the rules of `shrink` and `tiny_family` do not give: settings and inputs of single families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Override:
    config: dict[str, Any] = field(default_factory=dict)
    """Settings; a dict for those of a sub-config."""
    model_class: str | None = None
    """The class, if the auto classes have none or not the usual one."""
    attention: str | None = None
    """The attention implementation."""
    inputs: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    """Gets the model and the inputs made by rule, and returns those to use."""


OVERRIDES: dict[str, Override] = {}
