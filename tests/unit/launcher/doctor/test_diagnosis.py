"""`sparse-zero doctor` as a whole: its output and exit status, which hosts it checks, and when it starts the ranks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_cases import NO_ACCELERATOR, recipe, report

from launcher.cli import main
from launcher.doctor import local_checks, report_collection, slurm_checks
from launcher.doctor.diagnosis import diagnose
from launcher.doctor.findings import error
from launcher.doctor.report_collection import HostResponse
from sparse_zero.recipe.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("good_machine")


# The command


def test_json(capsys, measured):
    assert main(["doctor", "recipe.yaml", "launch.processes_per_node=2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["errors"], printed["warnings"]) == (0, 0)
    assert {tuple(finding) for finding in printed["findings"]} == {("severity", "check", "message", "remedy", "host")}
    assert {"versions", "ranks"} <= {finding["check"] for finding in printed["findings"]}
    [host] = printed["hosts"].values()
    assert host["versions"]["torch"] == "2.13.0+cu130"
    assert printed["ranks"]["links"][0]["bytes_per_second"] == 1e9
    assert len(measured) == 1


def test_no_ranks(capsys, measured):
    assert main(["doctor", "recipe.yaml", "--no-ranks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] is None
    assert measured == []


def test_output_for_people(capsys, monkeypatch, measured):
    changed = report({"shared_memory_bytes": 0, "versions.deepspeed": None})
    monkeypatch.setattr(report_collection, "collect_here", lambda request, launch: HostResponse(changed))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^ok +accelerator .*4 x NVIDIA H100 \(80\.0 GiB, nvidia 580\.65, bfloat16\)", out, re.M)
    assert re.search(r"^error +versions .*deepspeed is not installed *\n +-> .*pip install deepspeed", out, re.M)
    assert re.search(r"^warning +ranks +not started because of the errors above", out, re.M)
    assert out.endswith("\n1 error and 2 warnings\n")
    assert out.index("ok ") < out.index("warning") < out.index("error ")
    assert measured == [], "ranks were started although they cannot connect"


def test_the_same_finding_of_several_hosts_is_one_line(capsys, monkeypatch, measured):
    monkeypatch.setattr(
        report_collection, "collect_over_ssh", lambda hosts, requests, launch: [HostResponse(report())] * len(hosts)
    )
    monkeypatch.setattr(local_checks, "launcher_programs", lambda launch: [])
    (Path("hosts")).write_text("".join(f"n{number} slots=2\n" for number in range(1, 7)))
    assert main(["doctor", "recipe.yaml", "launch.hostfile=hosts"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ok +reachability +n1, n2, n3, n4 and 2 more +responds", out, re.M)
    assert re.search(r"^link +n1 rank 0 +n2 rank 1 +50 us +953\.7 MiB/s", out, re.M)
    assert out.endswith("\nno problems found\n")


@pytest.mark.parametrize("words", [["nowhere.yaml"], ["recipe.yaml", "launch.launcher=slrm"], ["--ranks"]])
def test_a_wrong_command_line_or_recipe_ends_with_two(words, capsys, measured):
    try:
        status = main(["doctor", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert capsys.readouterr().out == ""


def test_imports_no_torch_in_this_process():
    code = (
        "import sys\nfrom launcher.cli import main\nmain(sys.argv[1:])\n"
        "print('IMPORTED', sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "doctor", "recipe.yaml", "--no-ranks"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("IMPORTED []\n")
    assert re.search(r"^ok +backend .*gloo", done.stdout, re.M), "the host's own process did not import torch"


# Which hosts are checked


def diagnosed(monkeypatch, launch, training=None):
    """Returns: the request to each host of a recipe, by host name, and the findings."""
    seen = {}

    def collect(hosts, requests, launch):
        seen.update(zip(hosts, requests, strict=True))
        marker = requests[0]["marker"]
        return [HostResponse(report({"marker_is_seen": bool(marker) and Path(marker).is_file()})) for _ in hosts]

    monkeypatch.setattr(report_collection, "collect_over_ssh", collect)
    monkeypatch.setattr(
        report_collection, "collect_here", lambda request, launch: collect(["here"], [request], launch)[0]
    )
    found = diagnose(recipe({"output_dir": "out", **(training or {})}, **launch), "recipe.yaml", with_ranks=False)
    return seen, found.findings


def test_every_host_of_the_hostfile_is_checked(monkeypatch):
    Path("ds.json").write_text("{}")
    seen, found = diagnosed(monkeypatch, {"hostfile": "hosts", "master_port": 29500}, {"deepspeed": "ds.json"})
    assert [*seen] == ["n1", "n2"]
    assert [request["port"] for request in seen.values()] == [29500, None], "only rank 0's host needs the port"
    assert seen["n1"]["peers"] == ["n1", "n2"], "on its own host, the route to rank 0 is the loopback interface"
    assert seen["n2"]["files"] == ["recipe.yaml", "ds.json"]
    assert seen["n2"]["sources"]["data.path"]["name"] == "d.csv"
    assert any(finding.message.startswith("2 hosts see a file that this machine wrote") for finding in found)
    assert [*Path.cwd().glob(".sparse-zero-doctor-*")] == [], "the marker was left behind"


@pytest.mark.parametrize(
    ("launch", "hosts"),
    [
        ({}, ["here"]),
        ({"hostfile": "hosts", "exclude": "n1"}, ["n2"]),
        ({"hostfile": "hosts", "nodes": 1}, ["n1"]),
        ({"hostfile": "alone"}, ["localhost"]),
    ],
)
def test_hosts_after_filters(monkeypatch, launch, hosts):
    Path("alone").write_text("localhost slots=2\n")
    seen, _ = diagnosed(monkeypatch, launch)
    assert [*seen] == hosts


@pytest.mark.parametrize(
    ("launch", "complaint"),
    [
        ({"hostfile": "nowhere"}, "nowhere: No such file"),
        ({"hostfile": "hosts", "nodes": 3}, "launch.nodes: 3 requested"),
        ({"hostfile": "hosts", "include": "n3"}, "no host 'n3'"),
    ],
)
def test_an_invalid_hostfile(monkeypatch, launch, complaint):
    seen, found = diagnosed(monkeypatch, launch)
    assert [*seen] == ["here"], "this machine was not checked"
    [problem] = [finding for finding in found if finding.check == "hostfile"]
    assert (problem.severity, problem.remedy is not None) == ("error", True)
    assert complaint in problem.message


def test_a_host_without_a_report_does_not_hide_the_others(monkeypatch):
    problem = error("reachability", "ssh cannot log in: no route", "check that it is up", "n2")
    monkeypatch.setattr(
        report_collection, "collect_over_ssh", lambda *_: [HostResponse(report()), HostResponse(None, problem)]
    )
    diagnosis = diagnose(recipe(hostfile="hosts"), "recipe.yaml", with_ranks=False)
    assert problem in diagnosis.findings
    assert [*diagnosis.reports] == ["n1"]
    assert diagnosis.status == 1


def test_deepspeeds_file_must_be_json(monkeypatch):
    Path("ds.json").write_text("{")
    _, found = diagnosed(monkeypatch, {}, {"deepspeed": "ds.json"})
    assert any(finding.severity == "error" and "ds.json: not JSON" in finding.message for finding in found)


# The ranks


def test_ranks_are_not_started_outside_of_a_slurm_job(monkeypatch, measured):
    monkeypatch.setattr(slurm_checks, "check", lambda launch: [])
    monkeypatch.setattr(slurm_checks, "check_submission", lambda script, environment: [])
    diagnosis = diagnose(load_recipe("recipe.yaml", ["launch.launcher=slurm"]), "recipe.yaml")
    [found] = [finding for finding in diagnosis.findings if finding.check == "ranks"]
    assert (found.severity, measured) == ("warning", [])
    assert "salloc" in found.remedy


@pytest.mark.parametrize(("changes", "ranks"), [({}, "4"), (NO_ACCELERATOR, "2")])
def test_without_a_recipe_the_probe_uses_all_devices(changes, ranks, monkeypatch, measured):
    monkeypatch.setattr(report_collection, "collect_here", lambda request, launch: HostResponse(report(changes)))
    assert diagnose().status == 0
    [command] = measured
    assert command.argv[command.argv.index("--nproc-per-node") + 1] == ranks
    assert ("--cpu" in command.argv) == (changes is NO_ACCELERATOR)


@pytest.mark.parametrize(
    ("launch", "starter"),
    [({}, "deepspeed"), ({"launcher": "torchrun", "hostfile": "hosts"}, "pdsh"), ({"launcher": "mpi"}, "mpirun")],
)
def test_the_probe_is_started_as_the_run_would_be(launch, starter, monkeypatch, measured):
    monkeypatch.setattr(
        report_collection, "collect_over_ssh", lambda hosts, requests, launch: [HostResponse(report())] * len(hosts)
    )
    monkeypatch.setattr(local_checks, "launcher_programs", lambda launch: [])
    diagnose(recipe({"use_cpu": True}, **launch), "recipe.yaml")
    [command] = measured
    assert Path(command.argv[0]).name == starter
    assert re.search(r"sparse_zero\.ranks\.link_probe['\" ]+--seconds['\" ]+60['\" ]+--cpu", " ".join(command.argv))


def test_an_invalid_launch_section_is_found_without_starting_ranks(monkeypatch, measured):
    monkeypatch.setattr(
        report_collection, "collect_over_ssh", lambda hosts, requests, launch: [HostResponse(report())] * len(hosts)
    )
    monkeypatch.setattr(local_checks, "launcher_programs", lambda launch: [])
    Path("hosts").write_text("n1 slots=2\nn2 slots=1\n")
    launches = ({"launcher": "torchrun", "hostfile": "hosts"}, {"environment": {"NO_SUCH_VARIABLE": None}})
    for launch, complaint in zip(launches, ("the same number of ranks on each host", "NO_SUCH_VARIABLE"), strict=True):
        diagnosis = diagnose(recipe({"use_cpu": True}, **launch), "recipe.yaml", with_ranks=False)
        [found] = [finding for finding in diagnosis.findings if finding.severity == "error"]
        assert found.check == "launcher"
        assert complaint in found.message
        # Without the variable, the hosts cannot be asked for reports either.
        assert bool(diagnosis.reports) == ("hostfile" in launch)
    assert measured == []
