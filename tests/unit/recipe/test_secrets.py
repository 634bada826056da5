"""Which values of a recipe look like secrets, and overrides whose values others do not see."""

from typing import Any

import pytest

from sparse_zero.recipe.recipe import Recipe, load_recipe
from sparse_zero.recipe.secrets import hide_values, is_secret, warnings

HEX = "0123456789abcdef" * 2


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"path": "d", "columns": {"text": "t", "label": "l"}}, **sections}
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "anything"),
        ("WANDB_API_KEY", HEX),
        ("wandb_api_key", "short1"),
        ("MY_SECRET", "abcdef"),
        ("DB_PASSWORD", "abcdef"),
        ("NOTHING_SPECIAL", "hf_" + "a" * 34),
        ("NOTHING_SPECIAL", "sk-proj-" + "a" * 20),
        ("NOTHING_SPECIAL", "ghp_" + "a" * 36),
        ("NOTHING_SPECIAL", HEX),
    ],
)
def test_what_looks_like_a_secret(name: str, value: str) -> None:
    assert is_secret(name, value)
    [warning] = warnings(recipe(launch={"environment": {name: value}}))
    assert warning == (
        f"launch.environment.{name} looks like a secret: write {name}: null in launch.environment, and set {name} in "
        "the environment of the command"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false-ish"),
        ("NCCL_SOCKET_IFNAME", "ib0"),
        ("SSL_KEY_FILE", "/etc/ssl/key.pem"),
        ("AWS_ACCESS_KEY_ID", "not the secret itself"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("CODE_REVISION", HEX),
        ("WANDB_RUN_ID", HEX),
        ("EMPTY_TOKEN", ""),
        ("MONKEY", "banana"),
        ("TASK", "sk-learn"),
    ],
)
def test_what_does_not(name: str, value: str) -> None:
    assert not is_secret(name, value)
    assert warnings(recipe(launch={"environment": {name: value}})) == []


def test_a_value_of_the_environment_is_no_secret_of_the_recipe() -> None:
    assert warnings(recipe(launch={"environment": {"HF_TOKEN": None}})) == []
    assert warnings(recipe(model={"name": "m", "revision": "ab" * 20}, training={"learning_rate": 1e-3})) == []


@pytest.mark.parametrize(
    ("sections", "place"),
    [
        (
            {"training": {"hub_token": "hf_" + "a" * 34}},
            "training.hub_token looks like a secret: leave it out, write HF",
        ),
        ({"launch": {"prologue": ["export WANDB_API_KEY=abcdefgh"]}}, "launch.prologue contains what looks like a"),
        ({"launch": {"launcher": "slurm", "slurm": {"export": f"ALL,A_TOKEN={HEX}"}}}, "launch.slurm.export contains"),
        (
            {"launch": {"launcher": "slurm", "container": ["x", "--env", "HF_TOKEN=abcdef"]}},
            "launch.container contains",
        ),
        ({"data": {"path": "https://sk-" + "a" * 20 + "@h/d", "columns": {"text": "t", "label": "l"}}}, "data.path"),
    ],
)
def test_secrets_in_other_places(sections: dict[str, Any], place: str) -> None:
    [warning] = warnings(recipe(**sections))
    assert warning.startswith(place)
    assert "aaaa" not in warning
    assert HEX not in warning


def test_a_prologue_that_reads_a_secret_is_well() -> None:
    assert warnings(recipe(launch={"prologue": ["export HF_TOKEN=$(cat ~/.token)", 'A_KEY="$B_KEY" true']})) == []


@pytest.mark.parametrize(
    ("override", "hidden", "names"),
    [
        ("launch.environment.A=secret", "launch.environment.A=null", ["A"]),
        ("launch.environment.A=null", "launch.environment.A=null", []),
        ("launch.environment={A: secret, B: null}", 'launch.environment={"A": null, "B": null}', ["A", "B"]),
        ("launch={nodes: 2, environment: {A: s}}", 'launch={"nodes": 2, "environment": {"A": null}}', ["A"]),
        ("launch={nodes: 2}", "launch={nodes: 2}", []),
        ("launch.nodes=2", "launch.nodes=2", []),
        ("training.seed=1", "training.seed=1", []),
    ],
)
def test_overrides_without_the_values_of_variables(override: str, hidden: str, names: list[str]) -> None:
    assert hide_values([override, "training.seed=3"]) == ([hidden, "training.seed=3"], names)


def test_a_recipe_with_hidden_values_is_otherwise_the_same(tmp_path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\nlaunch: {environment: {B: b}}")
    overrides = ["launch.environment.A=secret", "launch.grace_seconds=3"]
    shown, hidden = load_recipe(file, overrides), load_recipe(file, hide_values(overrides)[0])
    assert shown.launch.environment == {"A": "secret", "B": "b"}
    assert hidden.launch.environment == {"A": None, "B": "b"}
    assert hidden.launch.grace_seconds == 3
