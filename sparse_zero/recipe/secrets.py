"""Keeps secrets out of what others can read: overrides without values, and warnings of secrets in a recipe."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from sparse_zero.recipe.recipe import Recipe

_SECRET_WORDS = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}
_PLACES = {"FILE", "PATH", "DIR", "NAME", "ID", "URL"}
"""A variable whose name ends in such a word says where a secret is, not what it is."""
_PUBLIC_HEX = {"REVISION", "COMMIT", "SHA", "HASH", "CHECKSUM", "ID", "NAME", "UUID"}
_KNOWN_SECRET = re.compile(
    r"\b(hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z\d]{16})"
)
_LONG_HEX = re.compile(r"[\da-fA-F]{32,}")
_ASSIGNMENT = re.compile(r"\b([A-Za-z_]\w*)=(['\"]?)([^\s'\"$;&,]+)")


def hide_values(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace the values of `launch.environment` in overrides by null, which means the value of the environment.

    Args:
        overrides: with which a recipe has been loaded.

    Returns:
        The overrides, and the names of the variables that they set.
    """
    hidden, names = [], []
    for override in overrides:
        key, _, text = override.partition("=")
        section, *inner = key.strip().split(".")
        value = yaml.safe_load(text) if section == "launch" else None
        if section == "launch" and len(inner) == 2 and inner[0] == "environment" and value is not None:
            names.append(inner[1])
            override = f"{key}=null"
        elif section == "launch" and inner == ["environment"] and value:
            names += value
            override = f"{key}={json.dumps(dict.fromkeys(value))}"
        elif section == "launch" and not inner and isinstance(value, dict) and value.get("environment"):
            names += value["environment"]
            value["environment"] = dict.fromkeys(value["environment"])
            override = f"{key}={json.dumps(value, default=str)}"
        hidden.append(override)
    return hidden, names


def warnings(recipe: Recipe) -> list[str]:
    """One sentence for each value of a recipe that looks like a secret: where it is and what to do, not the value."""
    advice = "write {name}: null in launch.environment, and set {name} in the environment of the command"
    found = []
    for name, value in recipe.launch.environment.items():
        if value and is_secret(name, value):
            found.append(f"launch.environment.{name} looks like a secret: {advice.format(name=name)}")
    elsewhere = {"model": recipe.model, "data": recipe.data, "launch": recipe.launch}
    sections = {name: section.model_dump(exclude={"environment"}) for name, section in elsewhere.items()}
    for key, value in _strings({**sections, "training": recipe.training}):
        name = re.sub(r"^(push_to_)?hub_token$", "HF_TOKEN", key.rpartition(".")[2])
        if key.startswith("training.") and is_secret(name, value):
            found.append(f"{key} looks like a secret: leave it out, {advice.format(name=name.upper())}")
        elif _KNOWN_SECRET.search(value) or any(is_secret(each[1], each[3]) for each in _ASSIGNMENT.finditer(value)):
            found.append(f"{key} contains what looks like a secret: {advice.format(name='its variable')}")
    return found


def is_secret(name: str, value: str) -> bool:
    """Whether a variable of this name and value looks like a secret."""
    words = name.upper().split("_")
    if _KNOWN_SECRET.search(value):
        return True
    if _LONG_HEX.fullmatch(value) and not _PUBLIC_HEX & set(words):
        return True
    return bool(_SECRET_WORDS & set(words)) and words[-1] not in _PLACES and len(value) > 5


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The strings within sections, each with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, key)
