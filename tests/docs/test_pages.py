"""What can be checked of a page without running it: links, commands, recipes, keys."""

import argparse
import re
from pathlib import Path

import pytest
import yaml
from docs_pages import PAGES, ROOT, Block, blocks, headings, inline_code, name_of, prose, sparse_zero_commands
from transformers import PreTrainedModel

import rpn
from launcher import cli
from sparse_zero.recipe import shipped
from sparse_zero.recipe.objective import KEYS
from sparse_zero.recipe.recipe import Recipe, _Loader
from sparse_zero.recipe.training import TrainingArguments, check_training

SECTIONS = set(Recipe.model_fields)
PLACEHOLDERS = {"N": "8", "M": "2"}
"""Stand for numbers in command lines of the prose."""

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_the_readme_has_at_most_160_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


@each_page
def test_a_page_has_one_title_and_starts_with_it(page: Path) -> None:
    assert page.read_text(encoding="utf-8").startswith("# ")
    assert len(re.findall(r"^# ", prose(page), re.M)) == 1


# Links


def links(page: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@each_page
def test_relative_links_and_their_anchors_exist(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in headings(target), f"{link}: no such heading"
        if page.parent.name == "docs":
            assert target.is_relative_to(ROOT / "docs"), f"{link}: the built site has no such page"


def test_the_navigation_names_every_page_and_no_other() -> None:
    text = re.sub(r"!!python/name:\S+", "null", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(entries: list) -> list[str]:
        found = []
        for entry in entries:
            for value in entry.values():
                found += files(value) if isinstance(value, list) else [value]
        return found

    named = files(yaml.safe_load(text)["nav"])
    assert len(named) == len(set(named))
    assert set(named) == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


# Commands


@each_page
def test_command_lines_parse(page: Path) -> None:
    for where, words in sparse_zero_commands(page):
        words = [PLACEHOLDERS.get(word, word) for word in words if word not in ("...", "…")]
        if any(word.startswith("[") for word in words):
            continue  # a usage line
        arguments = parsed(words)
        assert arguments is not None, f"{where}: sparse-zero {' '.join(words)}"
        for override in getattr(arguments, "overrides", []):
            key = override.partition("=")[0]
            assert is_key(key), f"{where}: {key}: no such key"


def parsed(words: list[str]) -> argparse.Namespace | None:
    """None: the command would refuse its arguments."""
    try:
        return cli._parse(words)
    except SystemExit as end:  # also of --help and --version
        return argparse.Namespace() if end.code == 0 else None


# Recipes


def is_key(dotted: str) -> bool:
    section, _, key = dotted.partition(".")
    if section == "training":
        return key in TrainingArguments.__dataclass_fields__ or key.split(".")[0] in KEYS
    schema = Recipe
    for part in dotted.split("."):
        field = getattr(schema, "model_fields", {}).get(part)
        if field is None:
            return getattr(schema, "__origin__", None) is dict or schema is dict
        schema = _section_of(field.annotation)
    return True


def _section_of(annotation):
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((each for each in candidates if hasattr(each, "model_fields")), annotation)


ALL_RECIPES = [block for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("block", ALL_RECIPES, ids=lambda block: block.id)
def test_yaml_blocks_are_recipes_or_sections_of_one(block: Block) -> None:
    raw = yaml.load(block.text, Loader=_Loader)
    assert set(raw) <= SECTIONS, "name another language for what is no recipe"
    recipe = Recipe.model_validate(completed(raw))
    check_training(recipe.training)


def completed(raw: dict) -> dict:
    """With the required sections, of which a page may show a part or nothing, and as `submit` completes it."""
    columns = raw.get("data", {}).get("columns", {})
    if raw.get("training", {}).get("objective") == "grpo":
        raw = raw | {"data": {"columns": {"prompt": "prompt"}} | raw.get("data", {})}
    classifies = "label" in columns or (not columns and raw.get("model", {}).get("task") == "sequence-classification")
    model = {"name": "model", "task": "sequence-classification" if classifies else "causal-lm"} | raw.get("model", {})
    data = {"path": "data", "columns": {"text": "text"} | ({"label": "label"} if classifies else {})}
    launch = raw.get("launch", {})
    launch = {"launcher": "slurm"} | launch if "slurm" in launch else launch
    return raw | {"model": model, "data": data | raw.get("data", {}), "launch": launch}


@each_page
def test_keys_that_a_page_names_exist(page: Path) -> None:
    for span in inline_code(page):
        match = re.fullmatch(rf"((?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*)(?:[:=].*)?", span)
        if match and not is_key(match[1]):
            section, name = match[1].split(".")[:2]
            is_file = re.search(r"\.(py|json|yaml|safetensors|md|txt)$", match[1])
            is_attribute = {"model": hasattr(PreTrainedModel, name) or name == "sparsity", "rpn": name in dir(rpn)}
            assert is_file or is_attribute.get(section), f"`{match[1]}`: no such key"


def test_the_page_on_recipes_names_every_key() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for section, field in Recipe.model_fields.items():
        for key in getattr(_section_of(field.annotation), "model_fields", {}):
            assert f"`{section}.{key}`" in page, f"{section}.{key} is not described"


def test_the_page_on_recipes_names_every_shipped_recipe_and_deepspeed_file() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in shipped.names(".yaml", ".json"):
        assert f"| `{name}` |" in page, f"{name} is not described"
