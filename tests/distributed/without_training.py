"""Runs of `sparse_zero.train` with stand_in/training_run.py in place of the training, for what launchers do."""

import json
import os
from pathlib import Path

STAND_IN = Path(__file__).with_name("stand_in")


def environment(modules: str | None = None) -> dict[str, str]:
    """What makes ranks, and their launchers, use the stand-in. Args: modules: the PYTHONPATH that they have anyway."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(STAND_IN), modules or os.environ.get("PYTHONPATH")]))}


def end(output: Path) -> None:
    """Let the step that the ranks are in be the last one."""
    (output / "enough").touch()


def check(output: Path, ranks: int, hosts: int = 1) -> range:
    """The run has ended by itself, and each step added what each of `ranks` ranks, on so many hosts, had given.

    Returns: the steps that it has made since it was started for the last time.
    """
    results = json.loads((output / "results.json").read_text())
    assert (results["world_size"], len(set(results["hosts"]))) == (ranks, hosts)
    of_one_step = sum(range(1, ranks + 1))
    steps = range(results["first_step"], results["first_step"] + len(results["sums"]))
    assert results["sums"] == [of_one_step * step for step in steps]
    return steps
