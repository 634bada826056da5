"""JSON for users and their programs, as the standard defines it: without NaN and infinite numbers."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def json_text(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """A value as indented JSON. Numbers that are NaN or infinite become null.

    Args: default: see json.dumps.

    Raises TypeError: JSON has no such type, and `default` is None.
    """
    return json.dumps(_finite(value), indent=2, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
