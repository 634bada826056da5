"""The settings that a checkpoint stores: read, compared, and refused if they are damaged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_zero.checkpoint.settings import Difference, check_settings, differences, read_settings, settings_table
from sparse_zero.errors import UserError

GOOD: dict[str, Any] = {"training": {"learning_rate": 0.1, "seed": 1}, "examples": {"count": 3, "first_step": 2}}


def checkpoint(directory: Path, text: str | None, scheduler: dict | None = None) -> SimpleNamespace:
    files = {}
    if text is not None:
        (directory / "settings.json").write_text(text)
        files = {"settings.json": None}
    manifest = SimpleNamespace(files=files, scheduler=scheduler)
    return SimpleNamespace(directory=directory, manifest=manifest, step=4)


def test_what_was_stored_is_read(tmp_path: Path) -> None:
    settings = GOOD | {"rpn": None, "data": {"path": "d"}}
    assert read_settings(checkpoint(tmp_path, json.dumps(settings))) == settings


@pytest.mark.parametrize(
    ("scheduler", "known"),
    [
        ({"base_lrs": [0.5, 0.5]}, {"training": {"learning_rate": 0.5}}),
        ({"base_lrs": []}, {}),
        ({"base_lrs": "x"}, {}),
        ({}, {}),
        (None, {}),
    ],
)
def test_of_an_older_checkpoint_the_rate_is_known(tmp_path: Path, scheduler, known) -> None:
    assert read_settings(checkpoint(tmp_path, None, scheduler)) == known


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        json.dumps(GOOD | {"training": None}),
        json.dumps(GOOD | {"training": {"learning_rate": "high"}}),
        json.dumps(GOOD | {"training": {"learning_rate": float("nan")}}),
        json.dumps(GOOD | {"examples": {"first_step": 5}}),
        json.dumps(GOOD | {"examples": {"first_step": -1}}),
        json.dumps(GOOD | {"rpn": 3}),
    ],
)
def test_damaged_settings_are_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"settings\.json: damaged; resume from another checkpoint"):
        read_settings(checkpoint(tmp_path, text))


def test_differences_are_by_key_and_say_what_is_used() -> None:
    saved = {"data": {"path": "a", "columns": {"text": "t"}}, "rpn": None, "training": {"learning_rate": 1, "old": 1}}
    here = {
        "data": {"path": "b", "columns": {"text": "u"}},
        "rpn": {"p": 1},
        "training": {"learning_rate": 2, "new": 1},
    }
    found = differences(saved, here, ())
    assert found == [
        Difference("data.path", "a", "b", False),
        Difference("data.columns.text", "t", "u", False),
        Difference("rpn", None, {"p": 1}, False),
        Difference("training.learning_rate", 1, 2, True),
    ]
    assert not any(each.is_restored for each in differences(saved, here, ["learning_rate"]))
    assert settings_table(found).splitlines()[3] == "  rpn                     none        set  the new one"
    assert differences(saved, saved, ()) == []


def test_settings_that_only_one_of_the_two_stores_do_not_count(tmp_path: Path) -> None:
    """A run without a recipe resumes from a checkpoint of a run with one, or of version 0.1."""
    for saved in ({}, {"training": {}}, {"training": {"learning_rate": 0.1}}, GOOD | {"data": {"path": "d"}}):
        check_settings(checkpoint(tmp_path, None), saved, GOOD, ())
        assert differences(saved, GOOD, ()) == []
