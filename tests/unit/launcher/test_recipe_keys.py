import json
import re

import pytest
import yaml

from launcher import recipe_keys
from launcher.cli import main
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.selection.config import SparseConfig


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def printed(capsys, *words: str) -> str:
    assert main(["keys", *words]) == 0
    return capsys.readouterr().out


def test_every_key_of_every_section_is_printed(capsys):
    out = printed(capsys)
    for section in ("model", "data", "data.columns", "sparse", "rpn", "training", "launch"):
        assert f"\n{section}" in f"\n{out}"
    for name in SparseConfig.model_fields:
        assert f"\nsparse.{name}: " in out
    assert "\ndata.columns.label: " in out


def test_a_key_with_its_type_default_and_meaning(capsys):
    assert printed(capsys, "sparse.selection").splitlines()[0] == (
        "sparse.selection: stratified | bernoulli | magnitude | magnitude-smallest | gradient | snip = stratified"
    )
    assert "\n    How scalars are selected. stratified: exactly the" in printed(capsys, "sparse.selection")
    assert printed(capsys, "data.path").startswith("data.path: str, required\n")
    assert printed(capsys, "sparse.density").startswith("sparse.density: float | null (> 0, <= 1) = null\n")
    assert "null: the classification head" in printed(capsys, "sparse.modules_to_save").replace("\n    ", " ")
    assert printed(capsys, "model").startswith("model, required\n")
    assert printed(capsys, "model.trust_remote_code").startswith("model.trust_remote_code: bool = false\n")
    assert printed(capsys, "data.train_split") == "data.train_split: str = train\n"
    assert printed(capsys, "sparse.trainable_token_indices").startswith(
        "sparse.trainable_token_indices: list[int] | null = null\n"
    )
    assert printed(capsys, "launch.environment").startswith("launch.environment: dict[str, str | null] = {}\n")


def test_a_section_alone(capsys):
    out = printed(capsys, "rpn")
    assert out.startswith("rpn\n    Which noise is added to the embeddings")
    assert "rpn.probability: float (> 0, <= 1) = 0.1\n" in out
    assert "sparse." not in out


def test_the_schema_is_of_the_whole_recipe(capsys):
    assert main(["keys", "sparse", "--json"]) == 2
    assert "leave KEY out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("sparse.granularty", "did you mean 'sparse.granularity'?"),
        ("training.learning_rate", "transformers.TrainingArguments"),
        ("nothing", "there is no such key"),
    ],
)
def test_a_key_that_does_not_exist(capsys, key, words):
    assert main(["keys", key]) == 2
    assert words in capsys.readouterr().err


def test_the_schema_is_the_one_that_reads_recipes(capsys, tmp_path):
    schema = json.loads(printed(capsys, "--json"))
    sparse = schema["$defs"]["SparseConfig"]
    assert sparse["additionalProperties"] is False
    assert sparse["properties"]["granularity"]["description"].startswith(
        "Number of scalars that are selected together"
    )
    recipe = {"model": {"name": "m"}, "data": {"path": "d", "columns": {"text": "t", "label": "l"}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    load_recipe(path)
    assert set(schema["required"]) == set(recipe)


def test_types_are_in_the_notation_of_recipes():
    for name, field in recipe_keys.all_keys():
        head = recipe_keys._entry(name, field).strip().splitlines()[0]
        if recipe_keys._section(field):
            assert head in (name, f"{name}, required")
            continue
        assert re.fullmatch(rf"{re.escape(name)}: [\w-]+[^<>]*( \([<>].*\))?(, required| = .+)", head), head
        assert not any(word in head for word in ("Ellipsis", "None", "typing", "Annotated", "FieldInfo")), head
