"""`sparse-zero compare`: which runs it makes, how it chooses and averages, what it refuses. Without training."""

import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from comparison_cases import Fake, described, results

from launcher import cli
from launcher.comparison import checks, command, directory, figure, runs, table
from launcher.comparison.runs import Ended, Progress
from launcher.comparison.summary import choose_rate, spread
from launcher.comparison.variants import Comparison, Run
from sparse_zero import UserError
from sparse_zero.checkpoint import output_lock
from sparse_zero.ranks.collectives import Ranks
from sparse_zero.recipe.learning_rate import default_learning_rate
from sparse_zero.recipe.recipe import load_recipe

# Which runs


def overrides_of(comparison: Comparison) -> dict[str, tuple[str, ...]]:
    return {variant.name: variant.overrides for variant in comparison.variants}


def test_methods_are_overrides_of_the_recipe(file) -> None:
    found = described(
        file, "sparse", "columns", "lora", "dora", "full", "head", "wide=sparse.density=0.1 rpn.passes=1"
    )
    assert overrides_of(found) == {
        "sparse": (),
        "columns": ("sparse.columns=whole",),
        "lora": ("training.method=lora", "training.budget=same"),
        "dora": ("training.method=dora", "training.budget=same"),
        "full": ("training.method=full",),
        "head": ("training.method=head",),
        "wide": ("sparse.density=0.1", "rpn.passes=1"),
    }
    assert found.shared == ("data.test_size=0.5",)
    assert found.run_count == 7 * 2


def test_a_recipe_of_another_method_gives_sparse_runs_too(file) -> None:
    given = ["training.method=lora", "training.lora={r: 4}", "sparse.granularity=16"]
    assert overrides_of(described(file, "sparse", "columns", "lora", "full", overrides=given)) == {
        "sparse": ("training.method=sparse", "training.lora=null"),
        "columns": (
            "training.method=sparse",
            "training.lora=null",
            "sparse.columns=whole",
            "sparse.granularity=1",
        ),
        "lora": (),
        "full": ("training.method=full", "training.lora=null"),
    }


def test_the_overrides_of_a_run_give_that_run(file) -> None:
    comparison = described(file, "sparse", "lora", overrides=["sparse.seed=7", "training.seed=3"])
    sparse, lora = comparison.variants
    first, second = (comparison.run(sparse, 0.03, seed) for seed in comparison.seeds)
    whole = load_recipe(file, list(second.overrides))
    assert (whole.training["seed"], whole.sparse.seed, whole.training["learning_rate"]) == (4, 8, 0.03)
    assert Path(whole.training["output_dir"]) == second.directory != first.directory
    assert load_recipe(file, list(first.overrides)).sparse.seed == 7
    assert not [word for word in comparison.run(lora, 0.03, 4).overrides if word.startswith("sparse.seed=8")]


def test_rates(file) -> None:
    def rates(*words: str, overrides: tuple[str, ...] = ()) -> dict[str, tuple[float, ...]]:
        found = described(file, "sparse", "lora", "own=training.learning_rate=0.5", rates=words, overrides=overrides)
        return {variant.name: variant.rates for variant in found.variants}

    assert rates() == {"sparse": (0.03,), "lora": (1e-3,), "own": (0.5,)}
    assert rates("1e-3,3e-3,1e-3") == dict.fromkeys(("sparse", "lora", "own"), (1e-3, 3e-3))
    assert rates("1e-3", "3e-3", "lora=1e-4", "lora=2e-4")["sparse"] == (1e-3, 3e-3)
    assert rates("1e-3", "3e-3", "lora=1e-4", "lora=2e-4")["lora"] == (1e-4, 2e-4)
    assert rates("1e-3,", "3e-3")["sparse"] == (1e-3, 3e-3)
    assert rates("1e-3", "lora=1e-4,2e-4") == {"sparse": (1e-3,), "lora": (1e-4, 2e-4), "own": (1e-3,)}


def test_a_sparse_run_beside_a_recipe_of_another_method_has_the_default_rate(file) -> None:
    given = ["training.method=full", "training.learning_rate=3e-5"]
    found = {v.name: v.rates for v in described(file, "full", "sparse", "columns", overrides=given).variants}
    default = default_learning_rate("sequence-classification", load_recipe(file, []).sparse.model_density)
    assert found == {"full": (3e-5,), "sparse": (default,), "columns": (default,)}


@pytest.mark.parametrize("name", ["odd # 1", "[b]", "a: b", "true", "10", "~x", "plain"])
def test_any_name_of_a_directory_is_that_of_the_run(file, tmp_path, name) -> None:
    columns = ["model.task=causal-lm", "data.columns={text: text}"]
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.txt").write_text("words")
    text = str(tmp_path / name / f"{name}.txt")
    found = described(file, "sparse", overrides=columns, out=str(tmp_path / name / "out"), text=text)
    run = found.run(found.variants[0], 0.1, 42)
    whole = load_recipe(file, list(run.overrides))
    assert (whole.training["output_dir"], whole.data.forgetting) == (str(run.directory), text)


def test_the_home_directory(file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert described(file, "sparse", out="~/out").out == tmp_path / "out"


def test_an_override_after_the_rates_is_one(file) -> None:
    found = described(file, "sparse", rates=("1e-3", "training.weight_decay=0.1"))
    assert found.recipe.training["weight_decay"] == 0.1
    assert found.variants[0].rates == (1e-3,)


def test_an_override_after_the_methods_is_one(file) -> None:
    arguments = cli._parse(["compare", str(file), "--methods", "sparse", "lora", "training.max_steps=3"])
    found = described(file, *arguments.methods, overrides=arguments.overrides)
    assert found.recipe.training["max_steps"] == 3
    assert [variant.name for variant in found.variants] == ["sparse", "lora"]


def test_a_language_model_gets_a_text(file, tmp_path) -> None:
    columns = ["model.task=causal-lm", "data.columns={text: text}"]
    assert described(file, "sparse", overrides=columns).recipe.data.forgetting == "shipped"
    (tmp_path / "own.txt").write_text("some words")
    found = described(file, "sparse", overrides=columns, text=str(tmp_path / "own.txt"))
    assert found.recipe.data.forgetting == str(tmp_path / "own.txt")


# What it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "loar"], "--methods: unknown method 'loar'; did you mean 'lora'?"),
        (["--methods", "sparse", "sparse"], "--methods: 'sparse' stands there twice"),
        (["--methods", "w!=sparse.density=0.1"], "--methods: 'w!' cannot name a variant"),
        (["--methods", "wide=density"], "--methods: 'wide=density': write NAME='section.key=value"),
        (["--methods", "lora=training.method=lora"], "--methods: 'lora' is a method; give the variant"),
        (["--methods", "wide=sparse.densty=0.1"], "unknown key 'densty' in section 'sparse'"),
        (["--rates", "1e-3,fast"], "--rates: 'fast' is not a learning rate"),
        (["--rates", "1e-3,,2e-3"], "--rates: '' is not a learning rate"),
        (["--rates", "sparse="], "--rates: '' is not a learning rate"),
        (["data.eval_size=1"], "data.eval_size: 1 leaves no example for the test; make it 2 or more"),
        (["data.eval_split=a", "data.test_split=a"], "data.test_split: 'a' is data.eval_split too"),
        (["--methods", "w=training.seed=3"], "--methods: 'w': training.seed is another in each run; give --seeds"),
        (["--methods", "w=training.output_dir=x"], "training.output_dir: each run has a directory of its own"),
        (["training.output_dir=x"], "training.output_dir: each run has a directory of its own; name that of all with"),
        (["--rates", "-1"], "--rates: '-1' is not a learning rate"),
        (["--rates", "0"], "--rates: '0' is not a learning rate"),
        (["--rates", "wide=1e-3"], "--rates: 'wide' is not among the methods"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--text", "text.txt"], "--text: forgetting is not defined for sequence-classification"),
        (["training.lora.r=4", "--budget", "same"], "training.lora: only for training.method: lora and dora"),
        (["data.eval_split=null", "training.objective=reward"], "data.columns"),
    ],
)
def test_bad_arguments_are_one_sentence(file, words, message, capsys) -> None:
    words = [f"--rates={word}" if word == "-1" else word for word in words if word != "--rates" or "-1" not in words]
    assert cli.main(["compare", str(file), *words, "--out", str(file.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparse-zero: error: ")
    assert message in said
    assert not (file.parent / "out").exists()


def test_a_text_that_is_none_is_one_sentence(file, tmp_path, capsys) -> None:
    words = ["compare", str(file), "model.task=causal-lm", "data.columns={text: text}", "--out", str(tmp_path / "out")]
    for content, message in (
        (b" \n", "is empty; give a text of a few pages"),
        (b"\xff\xfe", "cannot be read as text"),
    ):
        (tmp_path / "own.txt").write_bytes(content)
        assert cli.main([*words, "--text", str(tmp_path / "own.txt")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("sparse-zero: error: ")
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_variant_that_cannot_train_ends_the_comparison_before_its_first_run(file, tmp_path, capsys) -> None:
    """Of the variants that have not run; the recipe itself is valid."""
    tiny.save_bert(tmp_path / "base")
    capsys.readouterr()
    words = ["compare", str(file), "--methods", "sparse", "w=training.lr_scheduler_type=lienar", "--out"]
    assert cli.main([*words, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparse-zero: error: w: training: lienar is not a valid SchedulerType")
    assert not [*(tmp_path / "out").iterdir()]
    done = described(file, "w=training.lr_scheduler_type=lienar")
    run = done.run(done.variants[0], done.variants[0].rates[0], 42)
    run.directory.mkdir(parents=True)
    (run.directory / directory.RESULTS_FILE).write_text("{}")
    checks.check_variants(done)


def test_a_run_that_still_goes_on_ends_the_comparison(file, monkeypatch) -> None:
    comparison = described(file, "sparse")
    run = comparison.run(comparison.variants[0], comparison.variants[0].rates[0], 42)
    monkeypatch.setattr(output_lock, "_TIMEOUT_SECONDS", 0)
    monkeypatch.setattr(output_lock, "_try_to_lock", lambda file: False)  # as if another process had the lock
    with pytest.raises(UserError) as refused, output_lock.locked(run.directory, Ranks()):
        pass
    said = [str(refused.value)]

    def train(words: list[str], log: Path) -> int:
        log.write_text(f"sparse-zero: error: {said[0]}\n")
        return 2

    monkeypatch.setattr(runs, "_train", train)
    with pytest.raises(UserError, match="seed-42 is in use by "):
        command.run_all(comparison, runs.execute)
    # A port that is in use is a failure like any other
    said[0] = "the rendezvous port 29500 on n1 is in use by another program"
    assert runs.execute(comparison, run).problem == said[0]


def test_a_run_is_asked_to_stop_when_the_comparison_is_killed(tmp_path) -> None:
    """By SIGTERM, on which a run saves a checkpoint."""
    child = "import os, signal, sys, time; signal.signal(15, lambda *_: (print('asked', flush=True), os._exit(0)));"
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import subprocess, sys, time; from launcher.comparison.runs import _end_with_this_process;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=_end_with_this_process); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) > 0
        process.kill()
        assert process.stdout.readline() == "asked\n"


# How it chooses and averages


def test_the_best_rate_on_the_validation_examples_gets_the_other_seeds(file) -> None:
    comparison = described(file, "sparse", "full", rates=("1e-3,1e-2,1e-1",), seeds=3)
    quality = {("sparse", 1e-2): 0.8, ("full", 1e-3): 0.9}
    fake = Fake(lambda run: quality.get((run.variant, run.rate), 0.5) + 0.01 * (run.seed - 42))
    found = command.run_all(comparison, fake)
    assert fake.runs == [
        *(("sparse", rate, 42) for rate in (1e-3, 1e-2, 1e-1)),
        *(("sparse", 1e-2, seed) for seed in (43, 44)),
        *(("full", rate, 42) for rate in (1e-3, 1e-2, 1e-1)),
        *(("full", 1e-3, seed) for seed in (43, 44)),
    ]
    sparse, full = found["methods"]
    assert sparse["quality"]["values"] == pytest.approx([0.8, 0.81, 0.82])
    assert sparse["quality"]["mean"] == pytest.approx(0.81)
    assert sparse["quality"]["deviation"] == pytest.approx(statistics.stdev([0.8, 0.81, 0.82]))
    assert (sparse["is_rate_at_edge"], full["is_rate_at_edge"]) == (False, True)
    assert "that of full, but the difference to sparse is within" in found["says"]  # 4 points are twice its error
    assert [row["accuracy"] for row in table.table_rows(found)] == ["81.00 ± 1.00", "91.00 ± 1.00"]
    assert "full: the best rate is at the edge of those that were tried; try others." in table.notes(found)


@pytest.mark.parametrize(
    ("metric", "of_rates", "chosen"),
    [
        ("accuracy", {0.1: (0.5, 1.0), 0.2: (0.7, 1.0)}, 0.2),
        ("accuracy", {0.1: (0.7, 1.0), 0.2: (0.7, 0.9)}, 0.2),
        ("perplexity", {0.1: (5.0, 1.0), 0.2: (7.0, 1.0)}, 0.1),
        ("perplexity", {0.1: (math.inf, 1.0), 0.2: (7.0, 1.0)}, 0.2),
        ("perplexity", {0.1: (math.nan, math.nan)}, None),
        ("accuracy", {}, None),
    ],
)
def test_choose_rate(metric, of_rates, chosen) -> None:
    results_of = {rate: {metric: value, "loss": loss} for rate, (value, loss) in of_rates.items()}
    assert choose_rate(metric, results_of) == chosen


def test_spread() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "deviation": math.sqrt(2), "values": [1.0, 3.0]}
    assert spread([1.0, None, math.nan]) == {"mean": 1.0, "deviation": None, "values": [1.0]}
    assert spread([None]) is None


def test_a_run_that_fails_is_in_the_table_and_the_others_go_on(file, capsys) -> None:
    comparison = described(file, "sparse", "full", rates=("1e-3,1e-2",))
    failing = {("sparse", 1e-3, 42), ("full", 1e-3, 42), ("full", 1e-2, 42)}
    fake = Fake(lambda run: "out of memory" if (run.variant, run.rate, run.seed) in failing else 0.7)
    found = command.run_all(comparison, fake)
    sparse, full = found["methods"]
    assert (sparse["learning_rate"], sparse["seeds"]) == (1e-2, [42, 43])
    assert sparse["failed"] == {"sparse rate 0.001 seed 42": "out of memory"}
    assert len(full["failed"]) == 2
    assert "quality" not in full
    assert [row["runs"] for row in table.table_rows(found)] == ["2, 1 failed", "0, 2 failed"]
    assert "full rate 0.001 seed 42 failed: out of memory" in table.markdown(found, has_figure=False)
    assert "warning: full rate 0.01 seed 42 failed: out of memory" in capsys.readouterr().err
    with pytest.raises(UserError, match="out: no run has succeeded: no data"):
        command.run_all(comparison, Fake(lambda run: "no data"))


def test_the_sentence_says_what_chance_may_do(file) -> None:
    def said(seeds: int, metric: str = "accuracy", rates: tuple[str, ...] = (), **quality: float) -> str:
        comparison = described(file, *quality, seeds=seeds, rates=rates)
        shift = {42: -0.01, 43: 0.01}
        fake = Fake(lambda run: quality[run.variant] + (shift[run.seed] if seeds > 1 else 0))
        return command.run_all(comparison, fake)["says"]

    # Of 100 examples at 70% the standard error is 4.6 points, of a difference 6.5
    near = said(2, sparse=0.70, lora=0.69, full=0.40)
    assert "that of sparse, but the difference to lora is within what seeds and test examples vary;" in near
    assert "each at one rate, which was not tuned" in near
    assert "within what" not in said(2, sparse=0.90, full=0.40)
    # Both have errors: 90 against 81 of 100 are 9 points, and twice the error is 9.8
    assert "to full is within what seeds and test examples vary, and one seed does not" in said(
        1, sparse=0.90, full=0.81
    )
    assert "that of sparse, but one seed does not tell" in said(1, sparse=0.90, full=0.40)
    # All right does not mean without error
    assert "to full is within what" in said(1, sparse=1.0, full=0.96)
    tuned = said(1, sparse=0.9, full=0.4, rates=("sparse=1,2",))
    assert "each at the best of the rates that were tried, but full at one rate, and time" in tuned
    assert "each at the best of the rates that were tried, and time" in said(1, sparse=0.9, full=0.4, rates=("1,2",))


def test_runs_that_differ_in_what_they_must_share_are_noted(file) -> None:
    def execute(comparison: Comparison, run: Run) -> Ended:
        return Ended(run, results(0.5, world_size=2 if run.variant == "full" else 1))

    found = command.run_all(described(file, "sparse", "full"), execute)
    assert found["differing"] == {"world_size": [1, 2]}
    assert "The runs differ in world size (1, 2): they do not compare in all columns." in table.notes(found)
    assert not command.run_all(described(file, "sparse"), execute)["differing"]


def test_the_figure(file, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    found = command.run_all(described(file, "sparse", "full"), Fake(lambda run: 0.7))
    assert figure.draw(found, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    for each in found["methods"]:
        each.pop("quality")
    assert not figure.draw(found, tmp_path / "none.png")


def test_the_time_that_is_left(file, capsys) -> None:
    now = [0.0]
    progress, comparison = Progress(5, lambda: now[0]), described(file, "sparse", "full")
    sparse, full = comparison.variants
    left = ["sparse", "sparse", "full", "full"]
    assert progress.seconds_left(left) is None
    for variant, seconds in ((sparse, 10.0), (full, 70.0)):
        with progress.running(comparison.run(variant, 0.1, 42), left):
            now[0] += seconds
    done = comparison.run(full, 0.1, 44)
    done.directory.mkdir(parents=True)
    (done.directory / directory.RESULTS_FILE).write_text("{}")
    with progress.running(done, left):
        pass
    assert progress.seconds_left(["sparse", "full", "other"]) == 10 + 70 + 40
    with progress.running(comparison.run(full, 0.1, 43), ["sparse", "full"]):
        pass
    assert "sparse-zero: run 4 of 5: full rate 0.1 seed 43, 0:01:20 left\n" in capsys.readouterr().err


def test_compare_does_not_import_torch_before_its_runs(file, tmp_path) -> None:
    words = ["compare", str(file), "--methods", "lroa"]
    code = (
        f"import sys; from launcher import cli; s = cli.main({words!r}); sys.exit(9 if 'torch' in sys.modules else s)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'lora'" in done.stderr


def test_a_problem_is_the_last_error_that_was_printed() -> None:
    assert runs.problem_of("step 1\nsparse-zero: error: no such data\nmore\n", 2) == "no such data"
    assert runs.problem_of("step 1\nKilled\n\n", 137) == "exit status 137: Killed"
    assert runs.problem_of("", 1) == "exit status 1: no output"
