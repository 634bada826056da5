"""Model cards that people edit: what they wrote stays when a card is written anew.

Our text stands between two marks, invisible on the hub; the first has its checksum. A text that has changed since, or
that has no marks, is somebody's.
"""

import logging
import re
from typing import Any

import xxhash
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

logger = logging.getLogger(__name__)

_MARKED = re.compile(
    r"<!-- sparse-zero: rewritten with the adapter unless it was edited; checksum ([0-9a-f]{16}) -->\n"
    r"(.*?)\n<!-- sparse-zero: end -->",
    re.DOTALL,
)

_OURS = ("base_model", "base_model_relation", "library_name")
"""Metadata without which the hub shows another model, or another way to load it."""

_LICENCE = ("license", "license_name", "license_link")


def marked(text: str) -> str:
    """A text of ours between its marks."""
    return (
        f"<!-- sparse-zero: rewritten with the adapter unless it was edited; checksum {_checksum(text)} -->\n"
        f"{text}\n<!-- sparse-zero: end -->"
    )


def with_edits(new: str, found: str, where: str) -> str:
    """A new card that keeps what a person wrote into the one before.

    Texts outside our marks are kept. The text between them is replaced, unless it was edited. Of the metadata, the
    values that are there are kept and ours are added, to lists too; the base model and the library are ours.

    Args:
        new: the card of `model_card`.
        found: the card that it takes the place of.
        where: the card is found, for the warning that an edited text is kept as it is.

    Returns: the text of the card.
    """
    found = found.replace("\r\n", "\n")
    metadata, text = _parts(new)
    old_metadata, old_text = _parts(found)
    ours, theirs = _MARKED.search(text), _MARKED.search(old_text)
    if ours is None or not old_text.strip():
        kept = text
    elif theirs is not None and _checksum(theirs[2]) == theirs[1]:
        kept = old_text[: theirs.start()] + ours[0] + old_text[theirs.end() :]
    else:
        kept = old_text
        logger.warning(
            "%s: the text of the model card was edited, and stays as it is; only the metadata is new. Delete the text "
            "to have it written anew",
            where,
        )
    return f"---\n{yaml_dump(_merged(metadata, old_metadata), sort_keys=False)}---\n{kept}"


def _checksum(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.strip().encode())


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """The metadata, empty if they cannot be read, and the text."""
    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[2])
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, card[match.end() :]


def _merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    if old.get("license"):
        new = {key: value for key, value in new.items() if key not in _LICENCE}
    merged = old | {key: value for key, value in new.items() if key in _OURS or old.get(key) is None}
    for key, value in new.items():
        if key not in _OURS and isinstance(value, list) and (theirs := old.get(key)):
            theirs = theirs if isinstance(theirs, list) else [theirs]
            merged[key] = [*theirs, *(item for item in value if item not in theirs)]
    return merged
