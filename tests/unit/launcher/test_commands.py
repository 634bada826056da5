"""What the subcommands print, with stand-ins for what they call."""

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cli_cases import one_error

from launcher import processes, report
from launcher.cli import main
from launcher.ways import devices


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """No accelerator, none of the variables that the commands set."""
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that what a test leaves in it is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "count_accelerators", lambda: 0)


def stand_in(monkeypatch, module, **functions):
    """A module with `functions`, each of which also chatters on stdout as libraries do."""

    def chattering(function):
        def chatter(*arguments, **options):
            print("Loading weights: 100%")
            return function(*arguments, **options)

        return chatter

    fake = ModuleType(module)
    for name, function in functions.items():
        setattr(fake, name, chattering(function))
    monkeypatch.setitem(sys.modules, module, fake)


BARS = [(0, 0, 1), (0, 1e-8, 0), (1e-8, 1e-7, 3)]
DESCRIPTION = {
    "base_model": "org/[bold]model",
    "density": 0.02,
    "trainable_parameters": 453120,
    "bytes": 3 * 1024**2,
    "kinds": [{"name": f"layer.*.{'x' * 90}.weight", "shape": [384, 1536], "scalars": 11796}],
    "layers": [{"name": f"layer.{index}", "weights": 2} for index in range(40)],
    "tensors": [{"name": f"layer.{index // 2}.{index}.weight", "scalars": 1} for index in range(80)],
    "histogram": [{"from": start, "to": end, "scalars": n} for start, end, n in BARS],
    "largest": [{"name": "layer.3.weight", "position": [4, 5], "delta": -0.03125}],
    "notes": ["it was [long] ago"],
}


def test_evaluate(capsys, recipe, monkeypatch, tmp_path):
    def evaluate(recipe, adapter):
        assert (recipe.data.max_length, adapter) == (9, Path("."))
        assert os.environ["DS_ACCELERATOR"] == "cpu"
        return {"accuracy": 0.784, "loss": 0.5}

    stand_in(monkeypatch, "sparse_zero.training.evaluate", evaluate=evaluate)
    words = ["evaluate", recipe, "--adapter", ".", "data.max_length=9"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"accuracy": 0.784, "loss": 0.5}
    assert "Loading" in err
    assert main(words) == 0
    assert "accuracy  0.784" in capsys.readouterr().out


def test_merge(capsys, monkeypatch):
    facts = {"out": "merged", "task": "causal-lm", "scalars": 12345}

    def write_merged(adapter, out, scale, force, trust_remote_code, quantize, prompts):
        options = {"forced": force, "trusted": trust_remote_code}
        return {**facts, "out": out} | {name: True for name, given in options.items() if given}

    stand_in(monkeypatch, "sparse_zero.adapters.merging", write_merged=write_merged)
    assert main(["merge", ".", "merged", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main(["merge", ".", "merged"]) == 0
    out = capsys.readouterr().out
    assert "12,345" in out
    assert out.endswith("next: AutoModelForCausalLM.from_pretrained('merged')\n")
    assert main(["merge", ".", "merged", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts | {"forced": True}
    assert main(["merge", ".", "merged", "--trust-remote-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts | {"trusted": True}


def test_inspect(capsys, monkeypatch):
    stand_in(monkeypatch, "sparse_zero.adapters.inspection", describe=lambda adapter, base: DESCRIPTION)
    assert main(["inspect", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DESCRIPTION
    assert main(["inspect", "."]) == 0
    out = capsys.readouterr().out
    for shown in ("org/[bold]model", "453,120", "3.0 MiB", f"layer.*.{'x' * 90}.weight", "384 x 1536", "11,796"):
        assert shown in out, shown
    assert re.search(r"layer\.29 .*\n\.\.\. and 10 more: --json lists all\n", out)
    assert "\n80 weights: --json lists each\n" in out
    assert "layer.0.0.weight" not in out
    bars = [line.split("  ")[0] for line in out.splitlines() if re.search(r"\d\.\d% *$", line)]
    assert bars == ["0", "below 1e-08", "1e-08 to 1e-07"]
    assert f"1e-08 to 1e-07  {'#' * 40}  3  75.0%" in out
    assert "4, 5      -0.03125" in out
    assert out.endswith("note: it was [long] ago\n")


def test_convert(capsys, monkeypatch):
    def convert(source, out, to, base, max_density):
        return {"out": str(out), "to": to, "base_model": base, "max_density": max_density, "notes": ["kept whole"]}

    stand_in(monkeypatch, "sparse_zero.adapters.formats.convert", convert=convert)
    words = ["convert", ".", "new", "--to", "shira", "--base", "org/model"]
    assert main([*words, "--max-density", "0.25", "--json"]) == 0
    facts = {"out": "new", "to": "shira", "base_model": "org/model", "max_density": 0.25, "notes": ["kept whole"]}
    assert json.loads(capsys.readouterr().out) == facts
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"to +shira *\n", out)
    assert re.search(r"max density +0\.5 *\n", out)
    assert out.endswith("note: kept whole\n")


def test_readable():
    pairs = {("bytes", 12): "12 bytes", ("bytes", 1536): "1.5 KiB", ("n", None): "-", ("n", True): "yes"}
    assert report.readable("versions", {"torch": "2.6", "deepspeed": "0.16"}) == "torch 2.6, deepspeed 0.16"
    assert {given: report.readable(*given) for given in pairs} == pairs


def ending(monkeypatch, status, **facts):
    """Stands for ranks that end so."""
    facts = {"stopped": False, **facts}
    monkeypatch.setattr(processes, "run", lambda command, watchdog, stdout, grace: processes.RunExit(status, **facts))


def test_train_json_prints_the_results_of_this_run_only(capsys, recipe, monkeypatch, tmp_path):
    results = tmp_path / "runs" / "recipe" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text('{"accuracy": 0.1}')
    os.utime(results, (1, 1))

    ending(monkeypatch, 0)
    assert main(["train", recipe, "--json"]) == 2
    assert "runs/recipe/results.json: the run has finished, but wrote no results" in one_error(capsys)

    def run(command, watchdog, stdout, grace_seconds):
        assert stdout is sys.stderr
        results.write_text('{"accuracy": 0.8}')
        return processes.RunExit(0, stopped=False)

    monkeypatch.setattr(processes, "run", run)
    assert main(["train", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 0.8}


def test_a_failed_runs_old_results_are_not_printed(capsys, recipe, monkeypatch):
    ending(monkeypatch, 3)
    assert main(["train", recipe, "--json"]) == 3
    assert capsys.readouterr() == ("", "")


def test_a_killed_rank_is_reported_but_not_after_a_stop(capsys, recipe, monkeypatch):
    ending(monkeypatch, 137)
    assert main(["train", recipe]) == 137
    assert "a rank was killed by SIGKILL (possibly by the kernel, out of memory)" in one_error(capsys)
    ending(monkeypatch, 143, stopped=True)
    assert main(["train", recipe]) == 143
    assert capsys.readouterr() == ("", "")


def test_a_death_that_the_watchdog_has_told_of_is_not_told_again(capsys, recipe, monkeypatch):
    ending(monkeypatch, 137, is_explained=True)
    assert main(["train", recipe]) == 137
    assert capsys.readouterr() == ("", "")


LAUNCHES = [
    *(
        ["launch.launcher=local"],
        ["launch.launcher=torchrun"],
        ["launch.launcher=deepspeed"],
        ["launch.launcher=slurm"],
    ),
    *([f"launch.launcher={name}", "launch.hostfile=hosts"] for name in ("torchrun", "deepspeed", "mpi")),
    ["launch.launcher=deepspeed", "launch.hostfile=hosts", "launch.multinode=openmpi"],
]


@pytest.mark.parametrize("launch", LAUNCHES, ids=" ".join)
@pytest.mark.parametrize("json_words", [[], ["--json"]])
def test_a_dry_run_prints_no_value(capsys, recipe, monkeypatch, launch, json_words):
    Path("hosts").write_text("n1 slots=1\nn2 slots=1\n")
    Path(".deepspeed_env").write_text("OWN=5ec2e7-own\n")
    monkeypatch.setenv("HF_TOKEN", "5ec2e7-inherited")
    values = ["launch.environment.HF_TOKEN=null", "launch.environment.A=5ec2e7-given"]
    assert main(["train", recipe, *launch, *values, "--dry-run", *json_words]) == 0
    out, err = capsys.readouterr()
    assert "5ec2e7" not in out + err
    assert "HF_TOKEN" in out
    assert "launch.environment.A=null" in out


def test_a_secret_in_a_recipe_is_warned_of_once(capsys, recipe, monkeypatch):
    secret = "0123456789abcdef" * 2
    words = ["train", recipe, "launch.launcher=local", f"launch.environment.WANDB_API_KEY={secret}", "--dry-run"]
    assert main(words) == 0
    err = capsys.readouterr().err
    assert secret not in err
    assert err.startswith(
        "sparse-zero: warning: recipe.yaml: launch.environment.WANDB_API_KEY looks like a secret: write "
        "WANDB_API_KEY: null in launch.environment, and set WANDB_API_KEY in the environment of the command\n"
    )
    assert err.count("warning") == 1


def test_a_value_of_another_type_is_not_shown(capsys, recipe):
    assert main(["train", recipe, "launch.environment.A_TOKEN=[51234567]", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "launch.environment" in err
    assert "51234567" not in err
    assert main(["train", recipe, "launch.environment.A_TOKEN=51234567", "--dry-run"]) == 2
    assert "51234567" not in capsys.readouterr().err


def test_control_characters_from_hosts_are_escaped(capsys):
    report.say_error("n2: \x1b[2Jgone\x07")
    report.print_notes(["\x1b]0;title\x07"])
    report.print_rows([{"from": "n1\x1b[31m"}])
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert printed.count(r"\x1b") == 3
