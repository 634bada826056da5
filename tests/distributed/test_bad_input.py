"""What the user has to correct: one line from all ranks together, exit status 2, and nobody left waiting."""

from pathlib import Path
from typing import Any

import pytest
from ranks import ForkServer, Run, run_ranks
from recipes import write_recipe

pytestmark = pytest.mark.distributed

TASK = "sequence-classification"

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown-key": ({"training": {"learning_rat": 0.1}}, ["'learning_rat'", "'learning_rate'", "'training'"]),
    "not-a-number": ({"training": {"num_train_epochs": "two"}}, ["training.num_train_epochs", "'two'"]),
    "no-such-label": ({"data": {"columns": {"text": "text", "label": "lable"}}}, ["data.columns.label", "'lable'"]),
    "missing-file": (
        {"data": {"path": "nowhere/rows.jsonl", "data_files": None}},
        ["data.path", "nowhere/rows.jsonl"],
    ),
    "too-long": ({"data": {"max_length": 33}}, ["data.max_length", "33", "32"]),
    "density-of-none": ({"sparse": {"density": 0}}, ["sparse.density", "greater than 0"]),
    "density-over-all": ({"sparse": {"density": 1.5}}, ["sparse.density", "1.5"]),
    "nothing-left": ({"data": {"filter": {"source": "there"}}}, ["data.filter", "'there'"]),
    "no-such-target": ({"sparse": {"targets": ["valeu"]}}, ["sparse.targets", "'valeu'", "value"]),
    "no-checkpoint": ({"training": {"resume_from_checkpoint": "nowhere"}}, ["nowhere"]),
}
"""By name: what is wrong with the recipe, and what the message has to name."""


@pytest.fixture(scope="module")
def recipes(bases: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bad")
    return {
        name: write_recipe(directory / f"{name}.yaml", bases[TASK], TASK, data, **sections)
        for name, (sections, _) in BAD.items()
    }


@pytest.fixture(scope="module")
def ends(
    fork_server: ForkServer, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """How two ranks end that are given each bad recipe, and what they print."""
    jobs = {
        name: [{"count": 2, "call": "sparse_zero.train:main", "arguments": [[str(recipe)]]}]
        for name, recipe in recipes.items()
    }
    return {name: end for name, (end,) in fork_server.run(jobs, tmp_path_factory.mktemp("ends")).items()}


def errors_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if "error" in line.lower()]


@pytest.mark.parametrize("name", BAD)
def test_every_rank_ends_with_status_2_and_one_says_why(ends: dict[str, dict[str, Any]], name: str) -> None:
    assert ends[name]["statuses"] == [2, 2], ends[name]
    (line,) = errors_in(ends[name]["log"])
    assert line.startswith("sparse-zero: error: ")
    for part in BAD[name][1]:
        assert part in line


@pytest.fixture(scope="module")
def launched(recipes: dict[str, Path]) -> Run:
    """A launch with nothing but a bad recipe, which is asked to end with status 2.

    tests/unit/launcher/test_processes.py has the other launchers, with a stand-in that refuses its recipe.
    """
    return run_ranks(2, "sparse_zero.train", recipes["no-such-target"], launcher="deepspeed", status=2)


def test_the_launcher_ends_soon_and_leaves_no_process(launched: Run) -> None:
    assert launched.left_over == []
    assert launched.seconds < 60


def test_the_launch_prints_one_line_and_no_traceback(launched: Run) -> None:
    assert launched.output.count("sparse-zero: error: ") == 1
    assert "Traceback" not in launched.output
