"""A whole `sparse-zero compare` of a tiny model: its table agrees with single runs bit for bit, and it goes on."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipes
import tiny

from launcher import cli
from launcher.comparison import checks, runs
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training import run


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The directory of a comparison, and its compare.json."""
    folder = tmp_path_factory.mktemp("compare")
    tiny.save_llama(folder / "base")
    recipes.write_data(folder)
    training = {"max_steps": 3, "eval_on_start": False, "learning_rate": 0.01}
    launch = {"launcher": "local", "processes_per_node": 1}
    file = recipes.write_recipe(
        folder / "r.yaml", folder / "base", "causal-lm", folder, training=training, launch=launch
    )
    words = ["compare", str(file), "--methods", "lora", "--seeds", "1", "--out", str(folder / "out")]
    assert cli.main(words) == 0
    return folder / "out", json.loads((folder / "out" / "compare.json").read_text())


def test_the_table_agrees_with_single_runs_bit_for_bit(compared, tmp_path) -> None:
    _, found = compared
    (row,), (of_run,) = found["methods"], found["runs"]
    overrides = [*of_run["overrides"], f"training.output_dir={tmp_path / 'single'}"]
    single = run.train(load_recipe(found["recipe"], overrides), found["recipe"])
    assert row["quality"]["values"] == [single["test"]["perplexity"]]
    assert row["loss"]["values"] == [single["test"]["loss"]]
    assert row["forgetting"]["values"] == [single["forgetting"]["change"]]
    for key in ("rank", "sparse_parameters", "trainable_parameters", "checkpoint_bytes", "optimizer_bytes_per_rank"):
        assert row[key] == single[key]
    assert row["result_bytes"] == of_run["results"]["adapter_bytes"]
    file = "adapter/adapter_model.safetensors"
    assert (Path(of_run["directory"]) / file).read_bytes() == (tmp_path / "single" / file).read_bytes()


@pytest.fixture
def checks_here(monkeypatch) -> None:
    """The process that checks the recipes is this one, which has imported torch. `compared` starts another."""

    def check(words: list[str], input: str, **options: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        return SimpleNamespace(returncode=checks.main(), stderr="sparse-zero: error: see above")

    monkeypatch.setattr(checks, "subprocess", SimpleNamespace(run=check))


@pytest.mark.usefixtures("checks_here")
def test_each_method_agrees_with_its_single_run_bit_for_bit(compared, monkeypatch, tmp_path) -> None:
    """The runs of the comparison in this process: what it makes of them is the same for any."""
    _, found = compared

    def train(words: list[str], log: Path) -> int:
        run.train(load_recipe(words[1], words[2:-1]), words[1])
        return 0

    monkeypatch.setattr(runs, "_train", train)
    words = ["compare", found["recipe"], "--methods", "sparse", "dora", "full", "head", "--seeds", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    again = json.loads((tmp_path / "out" / "compare.json").read_text())
    for row, of_run in zip(again["methods"], again["runs"], strict=True):
        overrides = [*of_run["overrides"], f"training.output_dir={tmp_path / row['name']}"]
        single = run.train(load_recipe(found["recipe"], overrides), found["recipe"])
        assert row["method"] == single["method"] == row["name"]
        assert row["quality"]["values"] == [single["test"]["perplexity"]]
        assert row["loss"]["values"] == [single["test"]["loss"]]
        assert row["forgetting"]["values"] == [single["forgetting"]["change"]]
        assert row["trainable_parameters"] == single["trainable_parameters"]
        assert row["optimizer_bytes_per_rank"] == single["optimizer_bytes_per_rank"]
    assert len({row["quality"]["mean"] for row in again["methods"]}) == 4


def test_the_written_table(compared) -> None:
    out, found = compared
    text = (out / "compare.md").read_text()
    assert (
        f"| lora (rank {found['methods'][0]['rank']}) | {found['methods'][0]['trainable_parameters']:,} | 0.01 | "
        in text
    )
    assert found["says"] in text
    assert (out / "compare.png").exists() == ("compare.png" in text)


@pytest.mark.usefixtures("checks_here")
def test_runs_that_are_done_are_not_run_again_and_one_that_fails_is_said(compared, monkeypatch, capsys) -> None:
    out, found = compared
    ran = []

    def train(words: list[str], log: Path) -> int:
        ran.append(words)
        log.write_text("sparse-zero: error: there is no nose\n")
        return 2

    monkeypatch.setattr(runs, "_train", train)
    words = ["compare", found["recipe"], "--methods", "lora", "bad=sparse.density=0.1"]
    words += ["--seeds", "1", "--out", str(out)]
    assert cli.main(words) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert not ran
    assert cli.main([*words, "--resume", "--json"]) == 1
    (again,) = ran
    assert "sparse.density=0.1" in again
    assert "--resume" in again
    *others, bad = json.loads(capsys.readouterr().out)["methods"]
    assert others == found["methods"]
    assert [*bad["failed"].values()] == ["there is no nose"]
    assert "bad rate 0.01 seed 42 failed: there is no nose" in (out / "compare.md").read_text()
