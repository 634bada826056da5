"""`sparse-zero compare` on two ranks: stopped in a run it goes on, and its table is that of single runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ON_CPU, ForkServer
from recipes import write_recipe
from trainer_cases import run_cases, zero_config

from launcher import cli
from launcher.comparison import runs
from sparse_zero.ranks.stop_signals import STOPPED

pytestmark = pytest.mark.distributed

STEPS, SAVE_STEPS, SECONDS = 40, 2, 240
NOT_SAVED = "training.save_strategy=no"
SAME = ("sparse_parameters", "rank", "trainable_parameters", "optimizer_bytes_per_rank")


@pytest.fixture(scope="module")
def words(bases: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten " * 20)
    (folder / "zero.json").write_text(json.dumps(zero_config(2)))
    training = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS, "eval_on_start": False}
    training |= {"deepspeed": "zero.json", "save_total_limit": 1, "learning_rate": 1e-3, "disable_tqdm": True}
    launch = {"launcher": "local", "processes_per_node": 2}
    file = write_recipe(folder / "r.yaml", bases["causal-lm"], "causal-lm", data, training=training, launch=launch)
    given = ["--methods", "sparse", "lora", "--seeds", "1", "--text", str(folder / "text.txt")]
    return ["compare", str(file), *given, "--out", str(folder / "out")]


@pytest.fixture(scope="module")
def stopped(words: list[str]) -> tuple[int, str]:
    """A comparison that gets SIGTERM in its first run. Returns: its exit status and what it printed."""
    command = [sys.executable, "-m", "launcher", *words]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | ON_CPU, start_new_session=True, **pipes)
    deadline = time.monotonic() + SECONDS
    try:
        while not list(Path(words[-1]).glob("sparse/*/*/checkpoint-*/manifest.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=SECONDS)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, printed


@pytest.fixture(scope="module")
def compared(words: list[str], stopped: tuple[int, str], fork_server: ForkServer) -> dict:
    """compare.json of the comparison that has gone on. To save time, the ranks of its second run are forked."""
    start_ranks = runs._train

    def train(command: list[str], log: Path) -> int:
        if "training.method=lora" not in command:
            return start_ranks(command, log)
        directory = log.parent
        case = {"name": directory.name, "recipe": command[1], "overrides": command[2:-1], "merge": False}
        run_cases(fork_server, 2, [case], directory.parent, worker="methods_worker")
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_train", train)
        for name, value in ON_CPU.items():
            patch.setenv(name, value)
        assert cli.main([*words, "--resume"]) == 0
    return json.loads(Path(words[-1], "compare.json").read_text())


def test_a_stopped_comparison_says_how_it_goes_on(words, stopped, compared) -> None:
    status, printed = stopped
    assert (status, printed.splitlines()[-1]) == (
        STOPPED,
        f"sparse-zero: warning: {words[-1]}: stopped; go on with --resume",
    )
    assert "resum" in Path(compared["runs"][0]["directory"], "log.txt").read_text()


def test_the_table_agrees_with_single_runs_bit_for_bit(compared, fork_server: ForkServer, tmp_path) -> None:
    cases = [
        {
            "name": run["name"],
            "recipe": compared["recipe"],
            "overrides": [*run["overrides"], NOT_SAVED],
            "merge": False,
        }
        for run in compared["runs"]
    ]
    run_cases(fork_server, 2, cases, tmp_path, worker="methods_worker")
    for row in compared["methods"]:
        single = json.loads((tmp_path / row["name"] / "results.json").read_text())
        assert row["quality"]["values"] == [single["test"]["perplexity"]]
        assert row["loss"]["values"] == [single["test"]["loss"]]
        assert row["forgetting"]["values"] == [single["forgetting"]["change"]]
        assert {key: row.get(key) for key in SAME} == {key: single.get(key) for key in SAME}
    assert compared["world_size"] == 2
    assert [len(row["peak_memory_bytes_per_rank"]) for row in compared["methods"]] == [2, 2]
