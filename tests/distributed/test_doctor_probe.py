"""What the ranks measure for `sparse-zero doctor`, with real ranks."""

import json
import shutil
import subprocess
import sys

import pytest
from ranks import run_ranks

from launcher.doctor import links

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("launcher", ["deepspeed", "mpi"])
def test_doctor_measures_two_real_ranks(launcher, tmp_path, monkeypatch):
    if launcher == "mpi":
        if shutil.which("mpirun") is None:
            pytest.skip("no mpirun here")
        # The tests may run as root, and on a machine with one core.
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"):
            monkeypatch.setenv(name, "1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: .}\ndata: {path: d.csv, columns: {text: t, label: l}}\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "d.csv").write_text("t,l\n")
    words = [
        "doctor",
        recipe.name,
        "training.use_cpu=true",
        "launch.processes_per_node=2",
        f"launch.launcher={launcher}",
    ]
    # The checkout comes first, wherever the command is run.
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    told = json.loads(done.stdout)
    assert (done.returncode, told["errors"]) == (0, 0), told["findings"]
    assert told["ranks"]["world_size"] == 2
    assert [(link["from"], link["to"], link["right"]) for link in told["ranks"]["links"]] == [(0, 1, True)]
    assert [(each["bytes"], each["right"]) for each in told["ranks"]["collectives"]] == [(4, True), (2**24, True)]
    assert all(0 < link["latency_seconds"] < 1 for link in told["ranks"]["links"])
    assert all(each["bytes_per_second"] > 0 for each in (*told["ranks"]["links"], told["ranks"]["collectives"][1]))


@pytest.mark.parametrize("count", [1, 3])
def test_the_probe_of_torchrun(count):
    """The doctor above starts it with DeepSpeed's launcher and with mpirun."""
    run = run_ranks(count, "sparse_zero.ranks.link_probe", "--cpu", launcher="launcher.ways.torchrun")
    measured = links.parse_output(run.output, 0)
    assert sorted(measured.hosts) == list(range(count))
    assert sorted((link["from"], link["to"]) for link in measured.links) == sorted(links.pairs(count))
    assert [finding.check for finding in links.check_links(measured) if finding.severity == "error"] == []
    assert run.left_over == []


def test_ranks_that_nobody_joins_end_by_themselves(tmp_path):
    """One of two ranks is started: it says that it is there and whom it misses, and ends."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = links.Command(
        [sys.executable, "-m", "sparse_zero.ranks.link_probe", "--cpu", "--seconds", "2"], environment
    )
    measured = links.measure(command, seconds=60)
    assert measured.status == 2
    found = [finding.message for finding in links.check_links(measured)]
    assert found[0].startswith("rank 1 of 2 did not start")
    assert "rank 1 of 2 did not join within 2 s" in found[1]
