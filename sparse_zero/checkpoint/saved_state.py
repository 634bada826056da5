"""States of other objects in a checkpoint, as JSON values. They are compared with the state of the object that shall
get them: `load_state_dict` and `setattr` would take anything.
"""

import math
from collections.abc import Mapping
from typing import Any

from sparse_zero.errors import UserError


def fitted(saved: Mapping[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The state `own` of an object, with the values of a saved state of the same structure.

    Entries that the object does not have are left out: another version of its library may have written them.

    Args:
        saved: the state of a checkpoint.
        own: the present state of the object, of JSON values.
        where: what it is, for errors.

    Raises:
        UserError: a value has another type or length than the object's, or another text.
    """
    return {key: _fit(saved[key], value, f"{where}.{key}") if key in saved else value for key, value in own.items()}


def _fit(saved: Any, own: Any, where: str) -> Any:
    if isinstance(own, dict) and isinstance(saved, dict):
        return fitted(saved, own, where)
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [_fit(*pair, f"{where}.{index}") for index, pair in enumerate(zip(saved, own, strict=True))]
    if not is_like(saved, own) or isinstance(own, dict | list) or (isinstance(own, str) and saved != own):
        raise UserError(
            f"{where}: a state that does not fit this run: {_brief(saved)} in place of {_brief(own)}; resume with the "
            "settings with which the run was started"
        )
    return saved


def is_like(saved: Any, own: Any) -> bool:
    """Whether a saved value can be a later value of the same thing. What is None now can be anything later."""
    if own is None:
        return True
    if isinstance(own, bool) or not isinstance(own, int | float):
        return type(saved) is type(own)
    if type(saved) is int:
        return abs(saved) < 2**62
    # The best metric is infinite before there is one
    return type(saved) is float and isinstance(own, float) and (math.isfinite(saved) or not math.isfinite(own))


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:100]}"
