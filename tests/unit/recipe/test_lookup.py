"""Where a recipe, and a file that it names, is looked for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_zero.errors import UserError
from sparse_zero.recipe import shipped
from sparse_zero.recipe.lookup import find_recipe
from sparse_zero.recipe.recipe import load_recipe

TEXT = "model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The working directory `here`, next to the directory `there` with a recipe."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "recipe.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refusal(path, *overrides):
    with pytest.raises(UserError) as error:
        load_recipe(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


# Recipes


@pytest.mark.parametrize("name", ["demo.yaml", "configs/demo.yaml"])
def test_a_recipe_is_looked_for_here_then_among_the_shipped_ones(name):
    assert find_recipe(name) == shipped.directory() / "demo.yaml"
    assert load_recipe(name).training["output_dir"] == "runs/demo"
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(TEXT)
    assert find_recipe(name) == Path(name)
    assert load_recipe(name).model.name == "m"


def test_a_recipe_of_another_directory_is_not_replaced_by_a_shipped_one(tmp_path):
    assert "no such recipe" in refusal("there/demo.yaml")
    assert "no such recipe" in refusal(tmp_path / "demo.yaml")


def test_a_deepspeed_file_is_no_recipe():
    assert "zero2.json: no such recipe" in refusal("zero2.json")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dmo.yaml", "demo.yaml"),
        ("demo.yml", "demo.yaml"),
        ("demo", "demo.yaml"),
        ("confgs/demo.yaml", "demo.yaml"),
        ("../there/receipt.yaml", "../there/recipe.yaml"),
        ("causal-lm-chats.yaml", "causal-lm-chat.yaml"),
    ],
)
def test_a_missing_recipe_names_the_nearest(name, near):
    where = "neither at that path nor among the shipped ones (`sparse-zero recipes` lists them)"
    assert refusal(name) == f"{name}: no such recipe, {where}; did you mean '{near}'?"


def test_a_missing_recipe_that_resembles_none():
    assert refusal("zzzz.yaml").endswith("(`sparse-zero recipes` lists them)")


def test_errors_call_a_shipped_recipe_by_the_name_that_was_given():
    assert refusal("demo.yaml", "sparse.densty=1").startswith("demo.yaml: unknown key 'densty'")


def test_a_recipe_is_utf8_whatever_the_locale(here):
    Path("r.yaml").write_bytes(("# naïve\n" + TEXT + "training: {run_name: naïve}\n").encode())
    code = (
        "from sparse_zero.recipe.recipe import load_recipe; print(ascii(load_recipe('r.yaml').training['run_name']))"
    )
    env = {"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "'na\\xefve'\n"


# DeepSpeed files


def test_a_deepspeed_file_is_looked_up_beside_the_recipe_then_in_the_working_directory(tmp_path):
    def found():
        return load_recipe("../there/recipe.yaml", ["training.deepspeed=zero2.json"]).training["deepspeed"]

    assert json.loads(Path(found()).read_text())["zero_optimization"]["stage"] == 2
    assert Path(found()).parent == shipped.directory()
    Path("zero2.json").write_text("{}")
    assert found() == "zero2.json"
    (tmp_path / "there" / "zero2.json").write_text("{}")
    assert found() == "../there/zero2.json"


def test_a_shipped_recipe_takes_a_deepspeed_file_of_the_working_directory_first():
    overrides = ["training.deepspeed=zero3.json"]
    assert load_recipe("demo.yaml", overrides).training["deepspeed"] == str(shipped.directory() / "zero3.json")
    Path("zero3.json").write_text("{}")
    assert load_recipe("demo.yaml", overrides).training["deepspeed"] == "zero3.json"


def test_a_deepspeed_file_that_is_not_there(here):
    def message(name):
        places = "beside the recipe, in the working directory or among the shipped files"
        start = f"demo.yaml: training.deepspeed: no file '{name}' {places}"
        said = refusal("demo.yaml", f"training.deepspeed={name}")
        assert said.startswith(start)
        return said.removeprefix(start)

    assert message("zero22.json") == "; did you mean 'zero2.json'?"
    assert (
        message("demo.yaml")
        == "; there are zero1.json, zero2.json, zero2_offload.json, zero3.json, zero3_offload.json"
    )
    Path("my-zero.json").write_text("{}")
    assert message("my-zer.json") == "; did you mean 'my-zero.json'?"


# Noise files


def test_a_noise_file_is_looked_up_beside_the_recipe_then_in_the_working_directory(tmp_path):
    def found():
        return load_recipe("../there/recipe.yaml", ["rpn.noise=own.py:jitter"]).rpn.noise

    places = "beside the recipe or in the working directory"
    assert refusal("../there/recipe.yaml", "rpn.noise=own.py:jitter") == (
        f"../there/recipe.yaml: rpn.noise: no file 'own.py' {places}"
    )
    Path("own.py").touch()
    assert found() == "own.py:jitter"
    (tmp_path / "there" / "own.py").touch()
    assert found() == "../there/own.py:jitter"


def test_a_noise_of_a_module_is_left_alone():
    assert load_recipe("demo.yaml", ["rpn.noise=my.module:jitter"]).rpn.noise == "my.module:jitter"


def test_the_files_that_a_recipe_names():
    Path("own.py").touch()
    recipe = load_recipe("demo.yaml", ["rpn.noise=own.py:jitter", "training.deepspeed=zero1.json"])
    assert recipe.files == {"training.deepspeed": str(shipped.directory() / "zero1.json"), "rpn.noise": "own.py"}
    assert load_recipe("demo.yaml", ["training.deepspeed=null", "rpn=null"]).files == {}


def test_more_files_beside_the_shipped_ones_do_no_harm(tmp_path, monkeypatch):
    """Such as those that somebody adds to configs/ in a checkout."""
    configs = shutil.copytree(shipped.directory(), tmp_path / "configs")
    for name, text in {"mine.yml": "", "notes.txt": "", "own.py": "def jitter(): pass\n"}.items():
        (configs / name).write_text(text)
    monkeypatch.setattr(shipped, "directory", lambda: configs)
    assert find_recipe("demo.yaml") == configs / "demo.yaml"
    assert "did you mean 'demo.yaml'?" in refusal("dmo.yaml")
    assert load_recipe("demo.yaml", ["rpn.noise=own.py:jitter"]).rpn.noise == f"{configs / 'own.py'}:jitter"
    Path("own.py").touch()
    assert load_recipe("demo.yaml", ["rpn.noise=own.py:jitter"]).rpn.noise == "own.py:jitter"
    assert "mine.yml" not in [file.name for file in shipped.describe()]
