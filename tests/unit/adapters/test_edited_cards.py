"""A new model card keeps what a person wrote into the one before."""

import pytest
import yaml

from sparse_zero.adapters.edited_cards import marked, with_edits

METADATA = {"base_model": "org/new", "license": "other", "license_name": "odd", "tags": ["sparse-zero", "adapter"]}


def card(metadata: dict, text: str) -> str:
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{text}\n"


NEW = card(METADATA, marked("# New\n\n| 2 |"))
OLD = card(METADATA | {"base_model": "org/old"}, marked("# Old\n\n| 1 |"))


def merged(found: str) -> tuple[dict, str]:
    _, metadata, text = with_edits(NEW, found, "user/name").split("---\n")
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize("found", [OLD, NEW, "", "---\n\n---\n", card(METADATA, "")])
def test_what_nobody_edited_is_written_anew(found, caplog):
    assert with_edits(NEW, found, "user/name") == NEW
    assert not caplog.records


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_texts_around_ours_are_kept(line_break, caplog):
    found = OLD.replace("<!-- sparse-zero: r", "Mine.\n\n<!-- sparse-zero: r") + "\nAlso mine.\n"
    text = merged(found.replace("\n", line_break))[1]
    assert text == "\nMine.\n\n" + marked("# New\n\n| 2 |") + "\n\nAlso mine.\n"
    assert merged(with_edits(NEW, found, "user/name"))[1] == text
    assert not caplog.records


@pytest.mark.parametrize("found", [OLD.replace("| 1 |", "| 1 | 3 |"), card({}, "# Of mine"), "# Without metadata\n"])
def test_an_edited_text_is_kept_and_a_warning_says_so(found, caplog):
    metadata, text = merged(found)
    assert text.strip() == found.rpartition("---\n")[2].strip()
    assert metadata["base_model"] == "org/new"
    assert "user/name: the text of the model card was edited" in caplog.text


def test_metadata_of_a_person_are_kept():
    metadata, _ = merged(
        card({"license": "mit", "tags": ["french", "adapter"], "language": "fr", "metrics": None}, "")
    )
    assert metadata == {
        "license": "mit",
        "tags": ["french", "adapter", "sparse-zero"],
        "language": "fr",
        "metrics": None,
        "base_model": "org/new",
    }


@pytest.mark.parametrize("block", ["license: [broken", "- a list"])
def test_metadata_that_cannot_be_read_are_replaced(block):
    assert merged(f"---\n{block}\n---\nmine") == (METADATA, "mine")
