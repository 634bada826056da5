"""What `sparse-zero doctor` finds out about Slurm, with stand-ins for its programs."""

import json
import subprocess
from pathlib import Path

import pytest
from doctor_cases import recipe

from launcher.doctor import slurm_checks
from launcher.doctor.diagnosis import diagnose
from launcher.ways import reachability
from sparse_zero.recipe.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("good_machine")

SINFO = """\
main*|up|1-00:00:00|6|idle|gpu:h100:8(S:0-1)
main*|up|1-00:00:00|1|down*|gpu:h100:8(S:0-1)
debug|up|30:00|1|mix|(null)
old|down|infinite|2|idle|(null)
"""


def slurm(monkeypatch, *, refusal=None, accounts="", **launch):
    """Returns: the findings about Slurm for a launch section, and the scripts that sbatch got. Slurm is replaced."""
    scripts = []

    def run(command, seconds, stdin="", environment=None):
        scripts.extend([stdin] if command == ["sbatch", "--test-only"] else [])
        answers = {"sinfo": (0, SINFO, ""), "sacctmgr": (0, accounts, "")}
        trial = (1 if refusal else 0, "", f"sbatch: {refusal or 'Job 7 to start at noon'}\n")
        return subprocess.CompletedProcess(command, *answers.get(command[0], trial))

    monkeypatch.setattr(reachability, "run", run)
    monkeypatch.setattr(slurm_checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    overrides = [f"launch.{key}={json.dumps(value)}" for key, value in {"launcher": "slurm", **launch}.items()]
    loaded = load_recipe("recipe.yaml", overrides)
    found = diagnose(loaded, "recipe.yaml", overrides, with_ranks=False).findings
    return [finding for finding in found if finding.check == "slurm"], scripts


def test_a_job_that_slurm_accepts(monkeypatch):
    options = {"partition": "main", "time": "23:59:00", "gres": "gpu:h100:8", "account": "mine", "exclusive": True}
    found, scripts = slurm(monkeypatch, accounts="mine\nours\n", nodes=6, processes_per_node=8, slurm=options)
    assert [finding.severity for finding in found] == ["ok", "ok"]
    assert "6 usable nodes, at most 24 h" in found[0].message
    assert found[1].message == "sbatch accepts the job: Job 7 to start at noon"
    [script] = scripts
    assert script.startswith("#!")
    for option in ("nodes=6", "ntasks-per-node=8", "exclusive", "time=23:59:00", "gres=gpu:h100:8"):
        assert f"\n#SBATCH --{option}\n" in script, "sbatch tested another job than submit would send"
    assert "launch.nodes=6" in script
    assert [*Path.cwd().glob("out*")] == [], "something was written"


@pytest.mark.parametrize(
    ("launch", "severity", "message"),
    [
        ({"slurm": {"partition": "mane"}}, "error", "there is no 'mane'"),
        ({"slurm": {"partition": "old"}}, "error", "partition old is not up"),
        ({"nodes": 8}, "error", "launch.nodes: 8, but partition main has 7 nodes"),
        ({"nodes": 7}, "warning", "has only 6 usable nodes (6 idle, 1 down*)"),
        ({"slurm": {"time": "1-00:00:01"}}, "error", "more than the 24 h of partition main"),
        ({"slurm": {"time": 1441}}, "error", "more than the 24 h of partition main"),
        ({"slurm": {"partition": "debug", "gres": "gpu:1"}}, "error", "debug has no gres"),
        ({"slurm": {"gres": "gpu:a100:1"}}, "error", "gpu:a100:1, but a node of partition main has gpu:h100:8"),
        ({"slurm": {"gres": "gpu:9"}}, "error", "gpu:9"),
        ({"slurm": {"account": "yours"}}, "error", "launch.slurm.account: 'yours' is not one of your accounts"),
        ({"slurm": {"qos": "none"}}, "error", "sbatch rejects the job: Invalid qos"),
        ({"slurm": {"array": "1-3"}}, "error", "--array: not available for a submitted run"),
    ],
)
def test_a_job_that_slurm_rejects(monkeypatch, launch, severity, message):
    refusal = "error: x\nallocation failure: Invalid qos" if "qos" in str(launch) else None
    found = [
        each for each in slurm(monkeypatch, refusal=refusal, accounts="mine\n", **launch)[0] if each.severity != "ok"
    ]
    assert [finding.severity for finding in found] == [severity]
    assert message in found[0].message
    assert found[0].remedy


def test_slurm_without_a_recipe(monkeypatch):
    monkeypatch.setattr(slurm_checks.shutil, "which", lambda name: None if name == "srun" else name)
    [found] = slurm_checks.check(recipe(launcher="slurm").launch)
    assert (found.severity, found.message) == ("error", "srun is not installed on this machine")

    monkeypatch.setattr(slurm_checks.shutil, "which", lambda name: name)
    monkeypatch.setattr(reachability, "run", lambda c, _: subprocess.CompletedProcess(c, 1, "", "sinfo: error: no\nx"))
    assert [each.severity for each in slurm_checks.check(None)] == ["warning"]
    assert [each.severity for each in slurm_checks.check(recipe(launcher="slurm").launch)] == ["error"]

    monkeypatch.setattr(reachability, "run", lambda c, _: subprocess.CompletedProcess(c, 0, SINFO, ""))
    found = slurm_checks.check(None)
    assert [each.severity for each in found] == ["ok", "ok", "warning"]
    assert found[0].message == "partition main (default): 6 idle, 1 down*, gpu:h100:8(S:0-1) each"
