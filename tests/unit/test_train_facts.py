"""What the ranks of several hosts compare before they train, and what a rank says when it was stopped."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_zero.ranks.stop_signals import STOPPED, Stopped, StopRequest
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.train import Rank, facts_that_must_match

TEXT = """
model: {name: m}
data: {path: d, columns: {text: t, label: l}}
training: {output_dir: /out, deepspeed: z.json}
"""


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """Writes a recipe and its files to a directory; returns the facts of a rank that reads them there."""

    def facts(directory: str, deepspeed: str = "{}", noise: str = "f = abs", override: str = "rpn.noise=n.py:f"):
        for name, text in (("r.yaml", TEXT), ("z.json", deepspeed), ("n.py", noise)):
            (tmp_path / directory).mkdir(exist_ok=True)
            Path(tmp_path, directory, name).write_text(text)
        return facts_that_must_match(load_recipe(tmp_path / directory / "r.yaml", [override]))

    return facts


def test_files_may_be_in_different_places_on_each_host(facts):
    assert facts("here") == facts("there")
    assert set(facts("here")) == {"sparse-zero", "torch", "transformers", "deepspeed", "a recipe of checksum"}


@pytest.mark.parametrize(
    "change",
    [
        {"deepspeed": '{"zero_optimization": {"stage": 1}}'},
        {"noise": "f = max"},
        {"override": "rpn.noise=n.py:g"},
        {"override": "rpn.noise=n:f"},
        {"override": "rpn.noise=gaussian"},
        {"override": "training.deepspeed={}"},
        {"override": "sparse.density=0.5"},
    ],
)
def test_a_difference_is_seen(facts, change):
    assert facts("here") != facts("there", **change)


def test_the_checksum_in_torchs_store_is_not_made_of_secrets(facts):
    with_secret = facts("here", override="launch.environment.A_TOKEN=5ec2e7")
    assert with_secret == facts("here", override="launch.environment.A_TOKEN=another")
    assert with_secret != facts("here", override="launch.silence_seconds=7")


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("run/checkpoint-4", "saved run/checkpoint-4; resume with --resume"),
        ("other/checkpoint-4", "nothing to save; resume with --resume other/checkpoint-4"),
        (None, "nothing to save"),
    ],
)
def test_a_stopped_run_names_the_checkpoint_that_resume_finds(checkpoint, said, tmp_path, monkeypatch, capsys):
    """A run that resumes from another directory has saved nothing in its own before its first step."""
    monkeypatch.chdir(tmp_path)
    rank = Rank(StopRequest())
    rank._output = Path("run").resolve()
    assert rank.stopped(Stopped(4, checkpoint)) == STOPPED
    assert capsys.readouterr().err.strip() == f"sparse-zero: stopped at step 4: {said}"


IMPORTED = """
import gc
from sparse_zero import train

searches = []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
try:
    with train._uncollected():
        made = [[] for _ in range(10_000)]
        raise ValueError
except ValueError:
    pass
assert searches == [] and gc.isenabled(), searches
assert gc.get_freeze_count() > 10_000
more = [[] for _ in range(10_000)]
assert searches != []
"""


def test_garbage_is_searched_for_after_the_imports_of_a_rank_and_not_during_them():
    subprocess.run([sys.executable, "-c", IMPORTED], check=True)
