"""The arguments of `sparse-zero`, its errors and exit statuses; no rank is started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import dry_run, one_error

from launcher import adapter_commands, processes
from launcher.cli import build_parser, main
from sparse_zero.errors import UserError

BIN = Path(sys.executable).parent


IMPORTED = """
import sys
from launcher.cli import main
for words in {commands}:
    try: status = main(words)
    except SystemExit as end: status = end.code
    assert not status, (words, status)
print("IMPORTED", sorted({heavy} & set(sys.modules)))
"""
TORCH = {"torch", "transformers", "deepspeed", "datasets", "numpy"}


def imported(commands, heavy, first=""):
    code = f"{first}\n{IMPORTED.format(commands=commands, heavy=heavy)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *answers, last = done.stdout.splitlines()
    return answers, last


def test_help_imports_nothing_that_takes_long():
    names = next(action for action in build_parser()._actions if action.dest == "command").choices
    commands = [["--version"], ["--help"], *([name, "--help"] for name in names)]
    answers, last = imported(commands, TORCH | {"pydantic", "yaml", "rich", "psutil"})
    assert last == "IMPORTED []"
    assert sum(line.startswith("usage: sparse-zero") for line in answers) == len(commands) - 1 > 10


def test_what_needs_only_the_recipe_does_not_import_torch(recipe):
    commands = [["submit", recipe, "--dry-run"], ["keys"]]
    assert imported(commands, TORCH | {"rich"})[1] == "IMPORTED []"
    assert imported([["recipes"]], TORCH)[1] == "IMPORTED []"


def test_ranks_are_started_without_torch(recipe, tmp_path):
    """Which they import themselves."""
    standing_in = 'from launcher.ways import command\ncommand.TRAINING_MODULE = "this"'
    run = ["train", recipe, "launch.launcher=local", f"training.output_dir={tmp_path}", "training.use_cpu=true"]
    answers, last = imported([run], TORCH | {"rich"}, standing_in)
    assert "The Zen of Python, by Tim Peters" in answers
    assert last == "IMPORTED []"


def test_module_and_script_are_the_same_command():
    version = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([BIN / "sparse-zero"], [sys.executable, "-m", "launcher"])
    ]
    assert version[0] == version[1]
    assert version[0].startswith("sparse-zero 0.")


def test_overrides_may_follow_options(capsys, recipe):
    command, _ = dry_run(capsys, recipe, "training.seed=1", "--merge", "training.seed=2")
    assert command[-4:] == [recipe, "training.seed=1", "training.seed=2", "--merge"]


def test_what_is_reset_is_told_to_the_ranks(capsys, recipe):
    command, _ = dry_run(capsys, recipe, "--resume", "--reset", "learning_rate,data", "training.seed=1")
    assert command[-4:] == [recipe, "training.seed=1", "--resume=auto", "--reset=learning_rate,data"]


def test_a_name_that_cannot_be_reset(capsys, recipe):
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, "--resume", "--reset", "rate"])
    assert stop.value.code == 2
    assert "argument --reset: 'rate' is none of learning_rate, optimizer, data" in capsys.readouterr().err


def test_override_with_dashes_is_refused_with_the_right_spelling(capsys, recipe):
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, "--training.seed=1", "--dry-run"])
    assert stop.value.code == 2
    assert "write an override without dashes: training.seed=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["trian"], ["inspect", "a", "b"], ["evaluate", "r.yaml"], ["convert", "a", "b", "--to", "dora"], []]
)
def test_wrong_arguments_end_with_two(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: sparse-zero" in capsys.readouterr().err


# Errors


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["train", "recipe.yaml", "sparse.densty=0.1"], "did you mean 'density'?"),
        (["train", "recipe.yaml", "sparse.density=2"], "sparse.density"),
        (["train", "recipe.yaml", "--reset", "data"], "--reset: needs --resume"),
        (["train", "recipe.yaml", "word"], "override 'word': write section.key=value"),
        (["train", "recipe.yaml", "launch.master_port=70000"], "70000 is not a port number"),
        (["train", "recipe.yaml", "training.output_dir=recipe.yaml/x"], "recipe.yaml is a file"),
        (["train", "recipe.yaml", "training.deepspeed=broken.json"], "broken.json: not JSON"),
        (
            ["train", "recipe.yaml", "model.name=package://no_such_package/m"],
            "'no_such_package' is not an installed package",
        ),
        (["evaluate", "recipe.yaml", "--adapter", "nowhere"], "nowhere: no such adapter directory"),
        (["inspect", "nowhere"], "nowhere: no such adapter directory"),
        (["merge", "nowhere", "out"], "nowhere: no such adapter directory"),
    ],
)
def test_user_errors_are_one_line_and_status_two(words, complaint, capsys, recipe, monkeypatch):
    monkeypatch.setattr(processes, "run", lambda *a, **k: pytest.fail("ranks were started"))
    Path("broken.json").write_text("{'zero': 1}")
    assert main(words) == 2
    assert complaint in one_error(capsys)


def test_a_taken_port_is_refused(capsys, recipe):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["train", recipe, f"launch.master_port={port}"]) == 2
    assert f"{port} is in use" in one_error(capsys)


def test_interrupt_and_lines_of_an_error(capsys, monkeypatch):
    def raising(error):
        def command(arguments):
            raise error

        return command

    monkeypatch.setattr(adapter_commands, "inspect", raising(KeyboardInterrupt()))
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(adapter_commands, "inspect", raising(UserError("first\n  second")))
    assert main(["inspect", "x"]) == 2
    assert one_error(capsys) == "sparse-zero: error: first second\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    code = (
        "import sys, time\nfrom launcher import adapter_commands\nfrom launcher.cli import main\n"
        "adapter_commands.inspect = lambda arguments: (sys.stdin.read(), print('x' * 100000), 0)[2]\n"
        "sys.exit(main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, env={**os.environ}, text=True
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
