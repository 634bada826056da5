"""Recipes with an objective: whole runs in this process, and what is refused before them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_cases
import yaml
from trl_cases import OBJECTIVES

from launcher import cli
from sparse_zero import UserError, load_adapter
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.train import main
from sparse_zero.training.build import training_arguments

COLUMNS = {
    "sft": {"prompt": "prompt", "completion": "completion"},
    "dpo": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "reward": {"chosen": "chosen", "rejected": "rejected"},
    "grpo": {"prompt": "prompt"},
    "rloo": {"prompt": "prompt"},
}
OWN: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"trl": {"beta": 0.5}},
    "reward": {"trl": {"center_rewards_coefficient": 0.01}},
    "grpo": {
        "trl": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
        "reward_funcs": ["rewards.py:red", "rewards.py:wanted"],
    },
}


OWN["rloo"] = OWN["grpo"]


@pytest.fixture
def write(base: Path, data: Path, tmp_path: Path):
    """write(OBJECTIVE, **sections): a recipe of four steps beside the reward functions' file; returns it."""

    def write(objective: str, /, **sections: dict[str, Any]) -> Path:
        training = {"objective": objective, "output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"}
        training |= {"max_steps": 4, "save_steps": 2, "learning_rate": 0.02, "logging_steps": 1, **OWN[objective]}
        training |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
        recipe = {
            "model": {"name": str(base)},
            "data": {
                "path": str(data / f"{objective.replace('rloo', 'grpo')}.jsonl"),
                "columns": COLUMNS[objective],
                "eval_size": 4,
            },
            "sparse": {"density": 0.05, "targets": "all-linear"},
            "training": training,
        }
        for name, section in sections.items():
            recipe[name] = {key: value for key, value in (recipe.get(name, {}) | section).items() if value is not None}
        file = tmp_path / "r.yaml"
        file.write_text(yaml.safe_dump(recipe))
        (tmp_path / "rewards.py").write_text((data / "rewards.py").read_text())
        return file

    return write


def results(file: Path) -> dict[str, Any]:
    return json.loads((file.parent / "run" / "results.json").read_text())


@pytest.mark.parametrize("objective", [*OBJECTIVES, "rloo"])
def test_a_run_from_the_recipe_to_the_adapter(objective: str, write, base: Path):
    file = write(objective)
    assert main([str(file)]) == 0
    found = results(file)
    assert found["steps"] == 4
    assert {"loss", "loss_before"} <= found.keys()
    expected = {"sft": "mean_token_accuracy", "dpo": "rewards/margins", "reward": "accuracy"}
    assert expected.get(objective, "reward") in found
    if objective in ("grpo", "rloo"):
        assert "rewards/wanted/mean" in found
    if objective == "dpo":
        assert found["loss_before"] == pytest.approx(0.6931, abs=1e-4)
        assert found["rewards/margins_before"] == 0
    model = trl_cases.base_model(base, objective)
    load_adapter(model, str(file.parent / "run" / "adapter"))
    assert any(weight.delta.count_nonzero() for weight in model.sparsity.weights.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_ends_as_the_uninterrupted_one(objective: str, write):
    file = write(objective)
    assert main([str(file)]) == 0
    whole = results(file)
    assert main([str(file), f"--resume={file.parent / 'run' / 'checkpoint-2'}"]) == 0
    same = {key for key in whole if key.startswith("rewards") or key in ("loss", "reward", "accuracy")}
    assert {key: results(file)[key] for key in same} == {key: whole[key] for key in same}


@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_position_noise(objective: str, write, capfd):
    """Two passes, whose loss differs from that of one."""
    file = write(objective, rpn={"noise": "gaussian", "passes": 1})
    assert main([str(file)]) == 0
    noisy = results(file)["loss"]
    plain = write(objective, training={"output_dir": str(file.parent / "plain")})
    assert main([str(plain)]) == 0
    assert json.loads((file.parent / "plain" / "results.json").read_text())["loss"] != noisy


REFUSED = [
    ("dpo", {"rpn": {"noise": "gaussian"}}, "rpn: position noise is for the objectives sft and reward, not dpo"),
    ("grpo", {"rpn": {"noise": "gaussian"}}, "rpn: position noise is for the objectives sft and reward, not grpo"),
    ("dpo", {"training": {"objective": "dpoo"}}, r"training.objective: unknown objective 'dpoo'; did you mean 'dpo'"),
    ("dpo", {"training": {"objective": None}}, "training.trl: needs training.objective"),
    ("dpo", {"training": {"trl": {"betta": 1}}}, r"training.trl: trl.DPOConfig has no 'betta'; did you mean 'beta'"),
    ("dpo", {"training": {"trl": {"beta": "high"}}}, "training.trl.beta: input should be a valid number, not 'high'"),
    ("dpo", {"training": {"trl": {"learning_rate": 1}}}, "write training.learning_rate"),
    ("dpo", {"training": {"trl": {"max_length": 9}}}, "training.trl.max_length: write data.max_length"),
    ("dpo", {"training": {"trl": {"sync_ref_model": True}}}, "the reference of a sparse model is fixed"),
    ("dpo", {"training": {"trl": {"loss_type": ["sigmoyd"]}}}, "training.trl: Unknown loss type: sigmoyd"),
    ("dpo", {"training": {"trl": 3}}, "training.trl: must be a mapping"),
    ("dpo", {"training": {"reward_funcs": "a:b"}}, "only grpo and rloo have them, not dpo"),
    ("dpo", {"model": {"task": "sequence-classification"}}, "model.task: dpo trains a model for causal-lm"),
    ("dpo", {"data": {"columns": {"prompt": "prompt"}}}, "data.columns: dpo needs `chosen` and `rejected`"),
    ("dpo", {"data": {"packing": True}}, "data.packing: dpo does not pack examples"),
    ("grpo", {"data": {"max_length": 9}}, "data.max_length: grpo truncates no prompts"),
    ("rloo", {"data": {"max_length": 9}}, "data.max_length: rloo truncates no prompts"),
    ("grpo", {"training": {"reward_funcs": None}}, "training.reward_funcs is missing: grpo needs"),
    ("grpo", {"training": {"reward_funcs": "red"}}, "write MODULE:FUNCTION or FILE.py:FUNCTION, not 'red'"),
    ("grpo", {"training": {"reward_funcs": "rewards.py:blue"}}, "rewards.py: has no function 'blue'"),
    ("grpo", {"training": {"reward_funcs": "reward.py:red"}}, r"no file 'reward.py' .* did you mean 'rewards.py'"),
    ("grpo", {"training": {"per_device_train_batch_size": 3}}, "training: .*divisible"),
    ("reward", {"data": {"columns": {"chosen": "choosen", "rejected": "rejected"}}}, "did you mean 'chosen'"),
    ("sft", {"data": {"columns": {"text": "prompt", "label": "completion"}}}, "data.columns: sft needs `text`"),
]


@pytest.mark.parametrize(("objective", "sections", "message"), REFUSED, ids=[m[:40] for *_, m in REFUSED])
def test_what_is_refused_in_one_sentence(objective: str, sections: dict, message: str, write, capfd):
    file = write(objective, **sections)
    with pytest.raises(UserError, match=message):
        run_and_raise(str(file))


def run_and_raise(file: str) -> None:
    from sparse_zero import train
    from sparse_zero.training import run

    recipe = load_recipe(file)
    run.train(recipe, file, make=train._trainer_of(recipe))


def test_check_knows_objectives(write, capfd):
    assert cli.main(["check", str(write("grpo"))]) == 0
    assert cli.main(["check", str(write("dpo", training={"trl": {"betta": 1}}))]) == 2
    assert "trl.DPOConfig has no 'betta'; did you mean 'beta'?" in capfd.readouterr().err
    assert cli.main(["check", str(write("grpo", training={"reward_funcs": "rewards.py:blue"}))]) == 2
    assert "training.reward_funcs:" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["data", "evaluate", "find-rate"])
def test_commands_that_do_not_know_objectives_say_so(command: str, write, capfd, tmp_path: Path):
    file = str(write("dpo"))
    if command == "find-rate":
        assert main([file, "--find-rate"]) == 2
    else:
        assert cli.main([command, file, *(["--adapter", str(tmp_path)] if command == "evaluate" else [])]) == 2
    assert "not for training.objective: dpo" in capfd.readouterr().err


def test_arguments_keep_the_defaults_of_other_recipes(write):
    arguments = training_arguments(load_recipe(write("dpo", training={"logging_steps": None})))
    assert (arguments.logging_steps, arguments.gradient_checkpointing, arguments.bf16) == (500, False, False)
    assert (arguments.beta, arguments.async_save) == (0.5, False)


def test_without_an_objective_nothing_imports_trl(base: Path):
    import subprocess
    import sys

    code = "import sys, sparse_zero.training.run, sparse_zero.train, launcher.cli; assert 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trl_that_is_not_installed(write, monkeypatch):
    import sys

    from sparse_zero.training.trl_arguments import config_class

    monkeypatch.setitem(sys.modules, "trl", None)
    config_class.cache_clear()
    with pytest.raises(UserError, match=r"training.objective: dpo needs TRL: pip install 'sparse-zero\[trl\]'"):
        training_arguments(load_recipe(write("dpo")))


def test_the_columns_of_the_reward_functions(write, data: Path):
    torch.manual_seed(0)
    file = write("grpo", data={"columns": {"prompt": "wanted"}})
    with pytest.raises(UserError, match=r"data.columns.prompt: the training data has another column 'prompt'"):
        run_and_raise(str(file))
