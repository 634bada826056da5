"""Noise functions of the user's own, as a recipe names them."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaModel

import rpn
from rpn.config import RPNConfig, file_of
from rpn.user_noise import NoiseNotFound, load_noise

FUNCTION = "def double(embeddings, keep, stream):\n    return embeddings * 2\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_noise.cache_clear()
    return tmp_path


def tiny():
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(**settings, num_hidden_layers=1, pad_token_id=0)).train()


def seen_by_the_first_layer(model, tokens):
    seen = []
    handle = model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    model(tokens)
    handle.remove()
    return seen[0]


def test_a_function_of_a_file_disturbs_the_embeddings():
    Path("own.py").write_text(FUNCTION)
    model, tokens = tiny(), torch.tensor([[1, 2, 3]])
    clean = seen_by_the_first_layer(model, tokens)
    handle = rpn.attach(model, RPNConfig(noise="own.py:double"))
    assert torch.equal(seen_by_the_first_layer(model, tokens), 2 * clean)
    handle.detach()
    assert torch.equal(seen_by_the_first_layer(model, tokens), clean)


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
    with pytest.raises(
        NoiseNotFound, match=r"no module 'own_noises\.twice': install it, .*PYTHONPATH, or give a file as"
    ):
        load_noise("own_noises.twice:double")
    monkeypatch.syspath_prepend(here / "lib")
    assert load_noise("own_noises.twice:double")(torch.ones(1), None, None) == 2


@pytest.mark.parametrize(
    ("text", "noise", "complaint"),
    [
        (None, "own.py:double", r"^own\.py: no such file$"),
        (FUNCTION, "own.py:duoble", r"^own\.py has no function 'duoble'$"),
        ("double = 2", "own.py:double", r"^own\.py has a value, not a function, called 'double'$"),
        (FUNCTION, "own:double", r"^there is no module 'own'"),
        (FUNCTION, "os.pth:join", r"^there is no module 'os\.pth'"),
    ],
)
def test_what_is_not_found(text, noise, complaint):
    if text:
        Path("own.py").write_text(text)
    with pytest.raises(NoiseNotFound, match=complaint):
        load_noise(noise)


def test_an_error_of_the_users_code_keeps_its_traceback(here, monkeypatch):
    (here / "needs.py").write_text("import no_such_module\n" + FUNCTION)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_noise("needs.py:double")
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_noise("needs:double")


@pytest.mark.parametrize("noise", ["own", "own.py", ":f", "own.py:", "own.py:a-b", "own.py:a.b", "own.py:1"])
def test_what_names_no_function(noise):
    with pytest.raises(ValidationError, match=r"Input should be FILE\.py:FUNCTION or MODULE:FUNCTION"):
        RPNConfig(noise=noise)


def test_settings_of_other_noises_are_not_for_a_function():
    with pytest.raises(ValidationError, match=r"std is a setting of noise: gaussian, not of noise: own\.py:f"):
        RPNConfig(noise="own.py:f", std=0.5)
    assert RPNConfig(noise="own.py:f", passes=2, scope="sequence").passes == 2


def test_file_of():
    noises = ("own.py:f", "a/b c.py:f", "/x/own.py:f", "own:f", "own.py.z:f", "rpn", "none")
    assert [file_of(noise) for noise in noises] == ["own.py", "a/b c.py", "/x/own.py", None, None, None, None]
