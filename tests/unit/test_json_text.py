"""JSON that any parser reads."""

import json
import math

import numpy as np
import pytest

from launcher.report import print_json
from sparse_zero.json_text import json_text


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_are_null(capsys) -> None:
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2)}], "d": np.float64("nan"), "e": "NaN", "f": True}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": None, "e": "NaN", "f": True}
    assert json.loads(json_text(value), parse_constant=refuse) == expected
    print_json(value | {"g": {1, 2} & {1}})
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == expected | {"g": "{1}"}


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        json_text({"a": {1}})
