"""The directory of a comparison: whose it is, what goes on in it, what it was asked. Without training."""

import json
import math

import pytest
from comparison_cases import described

from launcher import cli
from launcher.comparison import directory, runs
from launcher.comparison.variants import Comparison
from sparse_zero import UserError


def opened(comparison: Comparison, resume: bool) -> None:
    checksum = directory.open_directory(comparison, resume)
    directory.write_comparison(comparison, {"methods": ["sparse"], "rates": [], "seeds": 2}, checksum)


def test_a_directory_of_another_comparison_is_refused(file, tmp_path) -> None:
    first = described(file, "sparse")
    opened(first, resume=False)
    # More methods, rates and seeds are the same comparison; so is another launcher
    opened(described(file, "sparse", "lora", seeds=3, rates=("1e-4",)), resume=False)
    opened(described(file, "sparse", overrides=["launch.launcher=local"]), resume=True)
    for other in (["training.max_steps=1"], ["data.test_size=3"], ["sparse.density=0.5"]):
        with pytest.raises(UserError, match="is the comparison of another recipe"):
            opened(described(file, "sparse", overrides=other), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="mine: exists and is not a comparison; name another directory with --out"):
        opened(described(file, "sparse", out=str(tmp_path / "mine")), resume=True)


@pytest.mark.parametrize("names_directory", [False, True])
def test_other_data_is_another_comparison(file, tmp_path, names_directory) -> None:
    """What the comparison writes is no data, even if it is below the directory of the data."""
    overrides = [f"data.path={tmp_path}", "data.data_files=null"] if names_directory else []
    comparison = described(file, "sparse", overrides=overrides)
    opened(comparison, resume=False)
    written = next(path for path in tmp_path.iterdir() if path.suffix == ".jsonl")
    (comparison.out / "a-run.jsonl").write_text("{}")
    opened(comparison, resume=True)
    written.write_text(written.read_text() + written.read_text())
    with pytest.raises(UserError, match="of other data"):
        opened(comparison, resume=True)


def test_a_run_with_other_overrides_is_found_before_the_first_run(file) -> None:
    comparison = described(file, "sparse", "full", rates=("0.1,0.2",))
    run = comparison.run(comparison.variants[1], 0.2, 43)
    opened(comparison, resume=False)
    run.directory.mkdir(parents=True)
    before = [*run.overrides, "launch.max_restarts=1"]
    (run.directory / directory.RUN_FILE).write_text(json.dumps({"overrides": before}))
    with pytest.raises(UserError, match="has runs of this comparison; go on with --resume"):
        opened(comparison, resume=False)
    opened(comparison, resume=True)  # another launch is the same run
    (run.directory / directory.RUN_FILE).write_text(json.dumps({"overrides": [*before, "sparse.density=0.5"]}))
    with pytest.raises(UserError, match=r"seed-43: is a run with other overrides \(sparse.density=0.5\); name"):
        opened(comparison, resume=True)
    with pytest.raises(UserError, match="is a run with other overrides"):
        runs.execute(comparison, run)


def test_what_is_asked_adds_to_what_was_asked_before(file) -> None:
    comparison = described(file, "sparse")
    nothing = {"methods": None, "rates": [], "seeds": None, "budget": None, "text": None}
    assert directory.with_earlier(comparison.out, nothing) == nothing
    first = nothing | {"methods": ["sparse", "w=sparse.density=0.1"], "rates": ["1e-3"], "seeds": 3, "budget": "same"}
    directory.write_comparison(comparison, first, directory.open_directory(comparison, resume=False))
    assert directory.with_earlier(comparison.out, nothing) == first
    more = {"methods": ["head", "sparse"], "rates": ["head=1", "1e-3"], "seeds": 2}
    assert directory.with_earlier(comparison.out, nothing | more) == first | {
        "methods": ["sparse", "w=sparse.density=0.1", "head"],
        "rates": ["1e-3", "head=1"],
    }
    assert directory.with_earlier(comparison.out, nothing | {"seeds": 5})["seeds"] == 5
    with pytest.raises(UserError, match=r"'w=sparse\.density=0\.2' was 'w=sparse\.density=0\.1' before; give"):
        directory.with_earlier(comparison.out, nothing | {"methods": ["w=sparse.density=0.2"]})


def test_a_directory_that_cannot_be_written_is_one_sentence(file, tmp_path, capsys) -> None:
    (tmp_path / "a-file").write_text("")
    assert cli.main(["compare", str(file), "--out", str(tmp_path / "a-file" / "out")]) == 2
    assert "out: cannot be written (Not a directory); name another directory with --out" in capsys.readouterr().err


def test_what_is_not_finite_is_null_in_json(tmp_path) -> None:
    directory.write_json(tmp_path / "a.json", {"a": [1.0, math.nan, (math.inf, 2)], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.0, None, [None, 2]], "b": {"c": None}}


def test_json_of_the_directory_is_checked(file) -> None:
    comparison = described(file, "sparse")
    opened(comparison, resume=False)
    assert json.loads((comparison.out / directory.COMPARISON_FILE).read_text())["recipe"] == str(file)
    (comparison.out / directory.COMPARISON_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"comparison.json: damaged; name another directory"):
        opened(comparison, resume=True)
