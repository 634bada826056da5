"""The command that a run prints at its end works as it is printed."""

import json
import shlex

import pytest
from cli_cases import one_error

from launcher.cli import main
from sparse_zero import UserError
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training import run
from sparse_zero.training.evaluate import evaluate
from sparse_zero.training.results_table import print_rates


def next_command(printed: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.startswith("next ")]
    return shlex.split(line)[2:]


@pytest.mark.parametrize("method", ["dora", "full"])
def test_the_next_command_of_a_method_that_was_an_override(recipe, capsys, method: str) -> None:
    file = recipe("run", training={"learning_rate": 1e-3, "save_strategy": "no", "max_steps": 2})
    overrides = [f"training.method={method}", "data.eval_size=7", "training.hub_token=hf_abcdefghijklmnopqrst"]
    results = run.train(load_recipe(file, overrides), str(file), overrides=overrides)
    printed = capsys.readouterr().out
    assert "hf_abc" not in printed
    assert main([*next_command(printed), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-6)
    # Also without the override of the method
    result = results["paths"].get("adapter") or results["paths"]["model"]
    as_sparse = evaluate(load_recipe(file, overrides[1:2]), result)
    assert as_sparse["loss"] == pytest.approx(results["loss"], rel=1e-6)
    capsys.readouterr()
    if method == "dora":
        assert main(["merge", result, str(file.parent / "merged")]) == 2
        said = one_error(capsys)
        assert "an adapter of PEFT's LoRA: `sparse-zero evaluate` evaluates it; merge it with PEFT" in said


def test_a_sparse_adapter_is_evaluated_with_a_recipe_of_another_method(recipe, train, tmp_path) -> None:
    file = recipe("run", training={"save_strategy": "no", "max_steps": 2})
    results = train(file)
    other = load_recipe(file, ["training.method=lora"])
    assert evaluate(other, tmp_path / "run" / "adapter")["loss"] == pytest.approx(results["loss"], rel=1e-6)
    with pytest.raises(UserError, match=r"is not an adapter of training.method: lora"):
        evaluate(other, tmp_path)


def test_the_next_command_after_a_search_has_the_overrides(capsys) -> None:
    found = {"steps": 2, "loss_before": 3.0, "rates": [{"learning_rate": 0.5, "loss": 1.0}], "chosen": 0.5}
    overrides = ["model.name=a b", "training.learning_rate=3", "launch.environment.HF_TOKEN=hf_abcdefghijklmnopqrst"]
    print_rates(found, ["r.yaml", *overrides])
    assert next_command(capsys.readouterr().out) == [
        *("train", "r.yaml", "model.name=a b", "launch.environment.HF_TOKEN=null", "training.learning_rate=0.5")
    ]
