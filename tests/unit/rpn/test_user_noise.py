"""Noise functions of the user's own, as a recipe names them."""

import sys
from pathlib import Path

import pytest
import torch
from noise_cases import embedded, llama
from pydantic import ValidationError

import rpn
from rpn.config import RPNConfig, file_of
from rpn.user_noise import NoiseNotFound, load_noise

FUNCTION = "def double(embeddings, keep, stream):\n    return embeddings * 2\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_of_a_file_changes_the_embeddings():
    Path("own.py").write_text(FUNCTION)
    model, tokens = llama(), torch.tensor([[1, 2, 3]])
    clean = embedded(model, tokens)
    handle = rpn.attach(model, RPNConfig(noise="own.py:double"))
    assert torch.equal(embedded(model, tokens), 2 * clean)
    handle.detach()
    assert torch.equal(embedded(model, tokens), clean)


def test_a_file_runs_once_and_another_of_its_name_is_another_module(here, monkeypatch):
    count = "import sys\nsys.runs = getattr(sys, 'runs', 0) + 1\n"
    monkeypatch.setattr("sys.runs", 0, raising=False)
    Path("own.py").write_text(f"{count}{FUNCTION}def half(embeddings, keep, stream):\n    return embeddings / 2\n")
    assert load_noise("own.py:double")(torch.ones(1), None, None) == 2
    assert load_noise("own.py:half")(torch.ones(1), None, None) == 0.5
    assert sys.runs == 1
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    Path("own.py").write_text(FUNCTION.replace("* 2", "* 3"))
    assert load_noise("own.py:double")(torch.ones(1), None, None) == 3


def test_a_file_that_fails_is_run_again():
    Path("own.py").write_text("raise OSError('not yet')")
    with pytest.raises(OSError, match="not yet"):
        load_noise("own.py:double")
    Path("own.py").write_text(FUNCTION)
    assert load_noise("own.py:double")(torch.ones(1), None, None) == 2


@pytest.mark.parametrize("name", ["json", "torch", "with-dash", "sub dir/x"])
def test_a_file_may_have_any_name(name, here):
    """Also that of a module which others import."""
    file = here / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(FUNCTION)
    assert load_noise(f"{file}:double")(torch.ones(1), None, None) == 2
    import json

    assert hasattr(json, "dumps")


def test_a_function_of_a_module_is_found_on_pythons_path(here, monkeypatch):
    (here / "lib" / "own_noises").mkdir(parents=True)
    (here / "lib" / "own_noises" / "__init__.py").touch()
    (here / "lib" / "own_noises" / "twice.py").write_text(FUNCTION)
    remedy = r"install it, .*PYTHONPATH, or give a file as own_noises/twice\.py:FUNCTION"
    with pytest.raises(NoiseNotFound, match=rf"no module 'own_noises\.twice': {remedy}"):
        load_noise("own_noises.twice:double")
    monkeypatch.syspath_prepend(here / "lib")
    assert load_noise("own_noises.twice:double")(torch.ones(1), None, None) == 2


@pytest.mark.parametrize(
    ("text", "noise", "message"),
    [
        (None, "own.py:double", r"^own\.py: no such file$"),
        (FUNCTION, "own.py:duoble", r"^own\.py: has no function 'duoble'$"),
        ("double = 2", "own.py:double", r"^own\.py: 'double' is not a function$"),
        (FUNCTION, "own:double", r"^there is no module 'own'"),
        (FUNCTION, "os.pth:join", r"^there is no module 'os\.pth'"),
        (FUNCTION, "./own:double", r"^'\./own' is not the name of a module; give a file as \./own\.py:FUNCTION$"),
    ],
)
def test_missing_files_modules_and_functions(text, noise, message):
    if text:
        Path("own.py").write_text(text)
    with pytest.raises(NoiseNotFound, match=message):
        load_noise(noise)


def test_an_error_of_the_users_code_keeps_its_traceback(here, monkeypatch):
    (here / "needs.py").write_text("import no_such_module\n" + FUNCTION)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_noise("needs.py:double")
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_noise("needs:double")


@pytest.mark.parametrize("noise", ["own", "own.py", ":f", "own.py:", "own.py:a-b", "own.py:a.b", "own.py:1"])
def test_invalid_noise_names(noise):
    with pytest.raises(ValidationError, match=r"Input should be FILE\.py:FUNCTION or MODULE:FUNCTION"):
        RPNConfig(noise=noise)


def test_settings_of_other_noises_are_not_for_a_function():
    with pytest.raises(ValidationError, match=r"std is a setting of noise: gaussian, not of noise: own\.py:f"):
        RPNConfig(noise="own.py:f", std=0.5)
    assert RPNConfig(noise="own.py:f", passes=2, scope="sequence").passes == 2


def test_file_of():
    noises = ("own.py:f", "a/b c.py:f", "/x/own.py:f", "own:f", "own.py.z:f", "rpn", "none")
    assert [file_of(noise) for noise in noises] == ["own.py", "a/b c.py", "/x/own.py", None, None, None, None]
