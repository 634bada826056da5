"""`sparse-zero doctor` as a whole: whom it asks, what it prints, how it ends; what it makes of Slurm and the links."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_cases import NO_ACCELERATOR, recipe, report

from launcher.cli import main
from launcher.doctor import examination, host_queries, links, slurm_checks
from launcher.doctor.findings import error
from launcher.doctor.host_queries import Answer
from launcher.ways import reachability
from sparse_zero.ranks.link_probe import MARK, pairs
from sparse_zero.recipe.recipe import load_recipe

DEMO = "model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\ntraining: {output_dir: out, use_cpu: true}\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """A directory with a recipe and a hostfile, outside of Slurm; this machine's report is good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SLURM_JOB_NODELIST", "DS_ENV_FILE", "PDSH_RCMD_TYPE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text(DEMO)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    monkeypatch.setattr(slurm_checks, "is_there", lambda: False)
    monkeypatch.setattr(host_queries, "ask_here", lambda question, launch: Answer(report()))


@pytest.fixture
def measured(monkeypatch):
    """Stands for the ranks; the list collects the commands that would have started them."""
    commands = []
    monkeypatch.setattr(links, "measure", lambda command: commands.append(command) or good_measurement())
    return commands


def lines(*facts, prefix=""):
    return "".join(f"{prefix}{MARK}{json.dumps(fact)}\n" for fact in facts)


def ranks(hosts):
    return [{"rank": rank, "world_size": len(hosts), "host": host} for rank, host in enumerate(hosts)]


def link(first, second, rate=1e9, latency=5e-5, right=True):
    return {
        "link": {"from": first, "to": second, "latency_seconds": latency, "bytes_per_second": rate, "right": right}
    }


def all_reduce(right=True):
    return [
        {"collective": "all_reduce", "bytes": size, "seconds": 1e-3, "bytes_per_second": 1e9, "right": right}
        for size in (4, 2**24)
    ]


def good_measurement():
    return links.read(lines(*ranks(["n1", "n2"]), link(0, 1), *all_reduce()), 0)


# The command


def test_json(capsys, measured):
    assert main(["doctor", "recipe.yaml", "launch.processes_per_node=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["errors"], told["warnings"]) == (0, 0)
    assert {tuple(finding) for finding in told["findings"]} == {("severity", "check", "message", "remedy", "host")}
    assert {"versions", "ranks"} <= {finding["check"] for finding in told["findings"]}
    [host] = told["hosts"].values()
    assert host["versions"]["torch"] == "2.13.0+cu130"
    assert told["ranks"]["links"][0]["bytes_per_second"] == 1e9
    assert len(measured) == 1


def test_no_ranks(capsys, measured):
    assert main(["doctor", "recipe.yaml", "--no-ranks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] is None
    assert measured == []


def test_what_people_read(capsys, monkeypatch, measured):
    changed = report({"shared_memory_bytes": 0, "versions.deepspeed": None})
    monkeypatch.setattr(host_queries, "ask_here", lambda question, launch: Answer(changed))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^ok +accelerator .*4 x NVIDIA H100 \(80\.0 GiB, nvidia 580\.65, bfloat16\)", out, re.M)
    assert re.search(r"^error +versions .*deepspeed is not installed *\n +-> .*pip install deepspeed", out, re.M)
    assert re.search(r"^warning +ranks +not started: the errors above come first", out, re.M)
    assert out.endswith("\n1 error and 2 warnings\n")
    assert out.index("ok ") < out.index("warning") < out.index("error ")
    assert measured == [], "ranks were started where they cannot meet"


def test_links_and_hosts_that_say_the_same_are_put_together(capsys, monkeypatch, measured):
    monkeypatch.setattr(host_queries, "ask_by_ssh", lambda hosts, questions, launch: [Answer(report())] * len(hosts))
    monkeypatch.setattr(examination.environment, "programs", lambda launch: [])
    (Path("hosts")).write_text("".join(f"n{number} slots=2\n" for number in range(1, 7)))
    assert main(["doctor", "recipe.yaml", "launch.hostfile=hosts"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ok +reach +n1, n2, n3, n4 and 2 more +answers", out, re.M)
    assert re.search(r"^link +n1 rank 0 +n2 rank 1 +50 us +953\.7 MiB/s", out, re.M)
    assert out.endswith("\nnothing is wrong\n")


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
    assert re.search(r"^ok +backend .*gloo", done.stdout, re.M), "the host's own process did not look at torch"


# Whom it asks


def asked(monkeypatch, launch, training=None):
    """The hosts and the questions of a recipe's examination, and its findings."""
    seen = {}

    def ask(hosts, questions, launch):
        seen.update(zip(hosts, questions, strict=True))
        marker = questions[0]["marker"]
        return [Answer(report({"marker_is_seen": bool(marker) and Path(marker).is_file()})) for _ in hosts]

    monkeypatch.setattr(host_queries, "ask_by_ssh", ask)
    monkeypatch.setattr(host_queries, "ask_here", lambda question, launch: ask(["here"], [question], launch)[0])
    found = examination.examine(
        recipe({"output_dir": "out", **(training or {})}, **launch), "recipe.yaml", with_ranks=False
    )
    return seen, found.findings


def test_every_host_of_the_hostfile_is_asked(monkeypatch):
    Path("ds.json").write_text("{}")
    seen, found = asked(monkeypatch, {"hostfile": "hosts", "master_port": 29500}, {"deepspeed": "ds.json"})
    assert [*seen] == ["n1", "n2"]
    assert [question["port"] for question in seen.values()] == [29500, None], "the port is rank 0's host's"
    assert seen["n1"]["peers"] == ["n1", "n2"], "the way to rank 0 is a loop on its own host"
    assert seen["n2"]["files"] == ["recipe.yaml", "ds.json"]
    assert seen["n2"]["sources"]["data.path"]["name"] == "d.csv"
    assert any(finding.message.startswith("2 hosts see what this machine writes") for finding in found)
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
def test_hosts_that_are_left(monkeypatch, launch, hosts):
    Path("alone").write_text("localhost slots=2\n")
    seen, _ = asked(monkeypatch, launch)
    assert [*seen] == hosts


@pytest.mark.parametrize(
    ("launch", "complaint"),
    [
        ({"hostfile": "nowhere"}, "nowhere: No such file"),
        ({"hostfile": "hosts", "nodes": 3}, "launch.nodes: 3 requested"),
        ({"hostfile": "hosts", "include": "n3"}, "no host 'n3'"),
    ],
)
def test_a_hostfile_that_cannot_be_used(monkeypatch, launch, complaint):
    seen, found = asked(monkeypatch, launch)
    assert [*seen] == ["here"], "this machine was not examined"
    [problem] = [finding for finding in found if finding.check == "hostfile"]
    assert (problem.severity, problem.remedy is not None) == ("error", True)
    assert complaint in problem.message


def test_a_host_without_a_report_leaves_the_others_examined(monkeypatch):
    problem = error("reach", "ssh cannot get in: no route", "see whether it is up", "n2")
    monkeypatch.setattr(host_queries, "ask_by_ssh", lambda *_: [Answer(report()), Answer(None, problem)])
    diagnosis = examination.examine(recipe(hostfile="hosts"), "recipe.yaml", with_ranks=False)
    assert problem in diagnosis.findings
    assert [*diagnosis.reports] == ["n1"]
    assert diagnosis.status == 1


def test_deepspeeds_file_must_be_json(monkeypatch):
    Path("ds.json").write_text("{")
    _, found = asked(monkeypatch, {}, {"deepspeed": "ds.json"})
    assert any(finding.severity == "error" and "ds.json: not JSON" in finding.message for finding in found)


def test_a_real_answer_by_a_stand_in_for_ssh(monkeypatch, tmp_path):
    """n1 lets us in and talks at login, n2 does not."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        "#!/bin/sh\nfor word; do host=$last; last=$word; done\n"
        'if [ "$host" = n2 ]; then echo "Permission denied (publickey)." >&2; exit 255; fi\n'
        'echo Welcome\ncd /\nexec sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    launch = recipe(
        environment={"NCCL_SOCKET_IFNAME": "it's $HOME"},
        prologue=["CUDA_VISIBLE_DEVICES=3; echo loading", "export CUDA_VISIBLE_DEVICES"],
    ).launch
    question = {"files": ["recipe.yaml", "no 'file'"], "output": "out"}
    first, second = host_queries.ask_by_ssh(["n1", "n2"], [question, question], launch)
    assert first.problem is None
    assert first.clock_offset == 0
    assert first.report["files"]["recipe.yaml"]
    assert first.report["files"]["no 'file'"] is None
    assert first.report["output"]["existing"] == str(tmp_path)
    assert first.report["variables"]["NCCL_SOCKET_IFNAME"] == "it's $HOME"
    assert first.report["variables"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert first.report["torch"] is None, "torch was not asked for"
    assert (second.report, second.problem.host) == (None, "n2")
    assert "ssh-copy-id n2" in second.problem.remedy

    [refused] = host_queries.ask_by_ssh(["n1"], [question], recipe(prologue=["false"]).launch)
    assert "launch.prologue" in refused.problem.message


# The ranks


def test_ranks_are_not_started_outside_of_a_slurm_job(monkeypatch, measured):
    monkeypatch.setattr(slurm_checks, "check", lambda launch: [])
    monkeypatch.setattr(slurm_checks, "trial", lambda script, environment: [])
    diagnosis = examination.examine(load_recipe("recipe.yaml", ["launch.launcher=slurm"]), "recipe.yaml")
    [found] = [finding for finding in diagnosis.findings if finding.check == "ranks"]
    assert (found.severity, measured) == ("warning", [])
    assert "salloc" in found.remedy


def judged(output, status=0):
    return [finding for finding in links.judge(links.read(output, status)) if finding.severity != "ok"]


def test_links_that_are_well():
    hosts = ["n1", "n1", "n2"]
    output = lines(*ranks(hosts), *(link(*pair) for pair in pairs(3)), *all_reduce())
    assert judged(output) == []
    [found] = links.judge(links.read(output, 0))
    assert found.message == "3 ranks on 2 hosts met; all-reduce 953.7 MiB/s"
    # pdsh names the host, two ranks' lines may have come out as one.
    merged = lines(*ranks(hosts), *(link(*pair) for pair in pairs(3)), prefix="n1: ").replace("}\nn1: ", "}")
    assert links.read(merged + lines(*all_reduce()), 0) == links.read(output, 0)


@pytest.mark.parametrize(
    ("output", "severity", "message"),
    [
        ("n1: command not found\n\n", "error", "the launcher started no rank (status 1): n1: command not found"),
        (
            "n2: DistError: timed out\nn2: \npdsh: ssh exited\n",
            "error",
            "no rank (status 1): n2: DistError: timed out",
        ),
        (lines(*ranks(["n1", "n2"])[:1]), "error", "rank 1 of 2 did not start; n1 did"),
        (
            lines(*ranks(["n1", "n2"]), {"problem": "rank 1 on n2 cannot reach rank 0"}) * 2,
            "error",
            "rank 1 on n2 cannot reach rank 0",
        ),
        (
            lines(*ranks(["n1", "n2", "n3"]), link(0, 1)) + "terminated\n",
            "error",
            "did not finish measuring from n1 (rank 0) - n3 (rank 2) on: terminated",
        ),
        (lines(*ranks(["n1", "n2"])), "error", "the ranks started, but did not finish measuring"),
        (lines(*ranks(["n1", "n2"]), link(0, 1), *all_reduce()), "warning", "ended with status 1"),
    ],
)
def test_ranks_that_do_not_get_through(output, severity, message):
    [found] = judged(output, status=1)
    assert (found.severity, found.check) == (severity, "ranks")
    assert message in found.message
    assert found.remedy


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"rate": 2e8}, "n1 (rank 0) - n3 (rank 2): 190.7 MiB/s, where the others have 953.7 MiB/s"),
        ({"latency": 1e-3}, "n1 (rank 0) - n3 (rank 2): 1,000 us, where the others have 50 us"),
        ({"right": False}, "n1 (rank 0) - n3 (rank 2): what came back was changed"),
    ],
)
def test_a_link_that_stands_out(odd, message):
    found = judged(lines(*ranks(["n1", "n2", "n3"]), link(0, 1), link(0, 2, **odd), link(1, 2), *all_reduce()))
    assert [finding.message for finding in found] == [message]


def test_slow_links_between_hosts_but_not_within_one():
    def both(**odd):
        return lines(*ranks(["n1", "n1"]), link(0, 1, **odd), *all_reduce()), lines(
            *ranks(["n1", "n2"]), link(0, 1, **odd), *all_reduce()
        )

    for odd in ({"rate": 9e7}, {"latency": 3e-3}):
        within, between = both(**odd)
        assert judged(within) == []
        assert len(judged(between)) == 1


def test_a_wrong_sum():
    found = judged(lines(*ranks(["n1", "n2"]), link(0, 1), *all_reduce(right=False)))
    assert [finding.message for finding in found] == ["an all-reduce of ones gave a wrong sum"]


def test_pairs():
    assert pairs(1) == []
    assert pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(pairs(8)) == 28
    assert pairs(9) == [(rank, (rank + 1) % 9) for rank in range(9)]


def test_nothing_of_a_probe_that_hangs_is_left():
    code = f'import subprocess, time; print(\'{MARK}\' + \'{{"rank": 0, "world_size": 2, "host": "n1"}}\', flush=True)'
    code += "; subprocess.run(['sleep', '987']); time.sleep(987)"
    measured = links.measure(links.Command([sys.executable, "-c", code], {}), seconds=1.5)
    assert measured.status is None
    assert measured.hosts == {0: "n1"}
    assert subprocess.run(["pgrep", "-x", "-f", "sleep 987"], capture_output=True).stdout == b""


# Slurm

SINFO = """\
main*|up|1-00:00:00|6|idle|gpu:h100:8(S:0-1)
main*|up|1-00:00:00|1|down*|gpu:h100:8(S:0-1)
debug|up|30:00|1|mix|(null)
old|down|infinite|2|idle|(null)
"""


def slurm(monkeypatch, *, refusal=None, accounts="", **launch):
    """The findings about Slurm for a launch section, and sbatch's input, with Slurm's programs standing in."""
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
    found = examination.examine(loaded, "recipe.yaml", overrides, with_ranks=False).findings
    return [finding for finding in found if finding.check == "slurm"], scripts


def test_what_slurm_would_take(monkeypatch):
    options = {"partition": "main", "time": "23:59:00", "gres": "gpu:h100:8", "account": "mine", "exclusive": True}
    found, scripts = slurm(monkeypatch, accounts="mine\nours\n", nodes=6, processes_per_node=8, slurm=options)
    assert [finding.severity for finding in found] == ["ok", "ok"]
    assert "6 usable nodes, at most 24 h" in found[0].message
    assert found[1].message == "sbatch would take it: Job 7 to start at noon"
    [script] = scripts
    assert script.startswith("#!")
    for option in ("nodes=6", "ntasks-per-node=8", "exclusive", "time=23:59:00", "gres=gpu:h100:8"):
        assert f"\n#SBATCH --{option}\n" in script, "sbatch was asked about another job than submit would send"
    assert "launch.nodes=6" in script
    assert [*Path.cwd().glob("out*")] == [], "something was written"


@pytest.mark.parametrize(
    ("launch", "severity", "message"),
    [
        ({"slurm": {"partition": "mane"}}, "error", "there is no 'mane'"),
        ({"slurm": {"partition": "old"}}, "error", "partition old is not up"),
        ({"nodes": 8}, "error", "launch.nodes: 8, but partition main has 7"),
        ({"nodes": 7}, "warning", "usable 6 (6 idle, 1 down*)"),
        ({"slurm": {"time": "1-00:00:01"}}, "error", "more than the 24 h of partition main"),
        ({"slurm": {"time": 1441}}, "error", "more than the 24 h of partition main"),
        ({"slurm": {"partition": "debug", "gres": "gpu:1"}}, "error", "debug has nothing of the kind"),
        ({"slurm": {"gres": "gpu:a100:1"}}, "error", "gpu:a100:1, but a node of partition main has gpu:h100:8"),
        ({"slurm": {"gres": "gpu:9"}}, "error", "gpu:9"),
        ({"slurm": {"account": "yours"}}, "error", "launch.slurm.account: 'yours' is not yours"),
        ({"slurm": {"qos": "none"}}, "error", "sbatch refuses such a job: Invalid qos"),
        ({"slurm": {"array": "1-3"}}, "error", "--array: not available for a submitted run"),
    ],
)
def test_what_slurm_would_refuse(monkeypatch, launch, severity, message):
    refusal = "error: x\nallocation failure: Invalid qos" if "qos" in str(launch) else None
    found = [
        each for each in slurm(monkeypatch, refusal=refusal, accounts="mine\n", **launch)[0] if each.severity != "ok"
    ]
    assert [finding.severity for finding in found] == [severity]
    assert message in found[0].message
    assert found[0].remedy


def test_slurm_as_such(monkeypatch):
    monkeypatch.setattr(slurm_checks.shutil, "which", lambda name: None if name == "srun" else name)
    [found] = slurm_checks.check(recipe(launcher="slurm").launch)
    assert (found.severity, found.message) == ("error", "no srun here")

    monkeypatch.setattr(slurm_checks.shutil, "which", lambda name: name)
    monkeypatch.setattr(reachability, "run", lambda c, _: subprocess.CompletedProcess(c, 1, "", "sinfo: error: no\nx"))
    assert [each.severity for each in slurm_checks.check(None)] == ["warning"]
    assert [each.severity for each in slurm_checks.check(recipe(launcher="slurm").launch)] == ["error"]

    monkeypatch.setattr(reachability, "run", lambda c, _: subprocess.CompletedProcess(c, 0, SINFO, ""))
    found = slurm_checks.check(None)
    assert [each.severity for each in found] == ["ok", "ok", "warning"]
    assert found[0].message == "partition main (default): 6 idle, 1 down*, gpu:h100:8(S:0-1) each"


@pytest.mark.parametrize(("changes", "ranks"), [({}, "4"), (NO_ACCELERATOR, "2")])
def test_without_a_recipe_the_probe_takes_all_devices(changes, ranks, monkeypatch, measured):
    monkeypatch.setattr(host_queries, "ask_here", lambda question, launch: Answer(report(changes)))
    assert examination.examine().status == 0
    [command] = measured
    assert command.argv[command.argv.index("--nproc-per-node") + 1] == ranks
    assert ("--cpu" in command.argv) == (changes is NO_ACCELERATOR)


@pytest.mark.parametrize(
    ("launch", "starter"),
    [({}, "deepspeed"), ({"launcher": "torchrun", "hostfile": "hosts"}, "pdsh"), ({"launcher": "mpi"}, "mpirun")],
)
def test_the_probe_is_started_as_the_run_would_be(launch, starter, monkeypatch, measured):
    monkeypatch.setattr(host_queries, "ask_by_ssh", lambda hosts, questions, launch: [Answer(report())] * len(hosts))
    monkeypatch.setattr(examination.environment, "programs", lambda launch: [])
    examination.examine(recipe({"use_cpu": True}, **launch), "recipe.yaml")
    [command] = measured
    assert Path(command.argv[0]).name == starter
    assert re.search(r"sparse_zero\.ranks\.link_probe['\" ]+--seconds['\" ]+60['\" ]+--cpu", " ".join(command.argv))


def test_a_launch_section_that_does_not_fit_is_found_without_starting_ranks(monkeypatch, measured):
    monkeypatch.setattr(host_queries, "ask_by_ssh", lambda hosts, questions, launch: [Answer(report())] * len(hosts))
    monkeypatch.setattr(examination.environment, "programs", lambda launch: [])
    Path("hosts").write_text("n1 slots=2\nn2 slots=1\n")
    launches = ({"launcher": "torchrun", "hostfile": "hosts"}, {"environment": {"NO_SUCH_VARIABLE": None}})
    for launch, complaint in zip(launches, ("the same number of ranks on each host", "NO_SUCH_VARIABLE"), strict=True):
        diagnosis = examination.examine(recipe({"use_cpu": True}, **launch), "recipe.yaml", with_ranks=False)
        [found] = [finding for finding in diagnosis.findings if finding.severity == "error"]
        assert found.check == "launcher"
        assert complaint in found.message
        # A variable that is missing cannot be given to the hosts either.
        assert bool(diagnosis.reports) == ("hostfile" in launch)
    assert measured == []
