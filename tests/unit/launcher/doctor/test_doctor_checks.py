"""Each thing that can be wrong with a host, between hosts or around them, is found when it is so, and only then."""

import os
import stat
from pathlib import Path

import pytest
from doctor_cases import GOOD, H100, NO_ACCELERATOR, recipe, report

from launcher.doctor import agreement, environment, host_checks, host_queries, inputs
from launcher.doctor.host_checks import Wanted

SEVERAL = Wanted(recipe(), ranks=4, several_hosts=True, master="n1")


def problems(findings):
    return [finding for finding in findings if finding.severity != "ok"]


def only_problem(findings):
    found = problems(findings)
    assert len(found) == 1, found
    assert found[0].remedy, "a problem without a remedy"
    return found[0]


# One host


@pytest.mark.parametrize("wanted", [Wanted(), SEVERAL, Wanted(recipe({"bf16": True, "use_cpu": True}), ranks=8)])
def test_a_good_host_has_no_problem(wanted):
    findings = host_checks.check_host(report(), wanted, "n1")
    assert problems(findings) == []
    assert {"versions", "operators", "accelerator", "backend", "shared memory", "files", "disk"} <= {
        finding.check for finding in findings
    }
    assert {finding.host for finding in findings} == {"n1"}


def hub(**changes):
    return {
        "name": "org/m",
        "place": "hub",
        "path": "org/m",
        "problem": None,
        "cached": True,
        "offline": False,
        **changes,
    }


ONE_HOST = {
    "a package is missing": (
        {"versions.deepspeed": None},
        SEVERAL,
        "error",
        "deepspeed is not installed",
        "pip install",
    ),
    "a package is too old": ({"versions.torch": "2.5.1"}, SEVERAL, "error", "torch is 2.5.1", "'torch>=2.6'"),
    "python is too old": ({"versions.python": "3.10.2"}, SEVERAL, "error", "python is 3.10.2", "another Python"),
    "torch is broken": ({"torch": {"problem": "OSError: libcudart"}}, SEVERAL, "error", "libcudart", "anew"),
    "no compiler, but the GPUs need none": ({"tools.g++": None}, SEVERAL, "warning", "no g++", "apt-get install g++"),
    "no compiler for a new operator": (
        {**NO_ACCELERATOR, "tools.g++": None, "operators": []},
        Wanted(recipe(), ranks=2),
        "error",
        "DeepSpeed cannot load deepspeed_shm_comm",
        "apt-get install g++",
    ),
    "no compiler for offloading": (
        {"tools.g++": None, "operators": []},
        Wanted(recipe({"deepspeed": "configs/zero3_offload.json"}), ranks=2),
        "error",
        "cpu_adam",
        "g++",
    ),
    "no ninja for a built operator": (
        {**NO_ACCELERATOR, "tools.ninja": None},
        Wanted(recipe(), ranks=2),
        "error",
        "no ninja",
        "PATH",
    ),
    "too many ranks": ({}, Wanted(recipe(), ranks=5), "error", "5 ranks, but 4 accelerators", "slots=4"),
    "an old GPU": (
        {"torch.bf16": False},
        Wanted(recipe({"bf16": True}), ranks=4),
        "error",
        "NVIDIA H100 has no bfloat16",
        "training.bf16=false",
    ),
    "torch sees no GPU": (
        {"torch": NO_ACCELERATOR["torch"]},
        Wanted(recipe(), ranks=2),
        "warning",
        "there is /dev/nvidia0, but torch (built for CPU) sees no device",
        "driver",
    ),
    "too few cores": (NO_ACCELERATOR, Wanted(recipe(), ranks=9), "warning", "9 ranks share 8 CPU cores", "8 or fewer"),
    "no NCCL": ({"torch.nccl": None}, SEVERAL, "error", "without NCCL", "CUDA build"),
    "no gloo": ({"torch.gloo": False}, SEVERAL, "error", "without gloo", "usual build"),
    "a loopback name": (
        {
            "network.gloo_address": "127.0.1.1",
            "network.name_resolves_to": ["127.0.1.1"],
            "network.routes": {"n1": {"address": "127.0.1.1", "interface": "lo"}},
        },
        SEVERAL,
        "error",
        "its name n1 resolves to 127.0.1.1",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    "no such interface": (
        {"variables": {"GLOO_SOCKET_IFNAME": "ib0"}},
        SEVERAL,
        "error",
        "there is no interface ib0",
        "choose one of eth0",
    ),
    "no such interface for NCCL": (
        {"variables": {"NCCL_SOCKET_IFNAME": "ib"}},
        SEVERAL,
        "error",
        "NCCL_SOCKET_IFNAME=ib fits no interface",
        "eth0",
    ),
    "an unknown rank 0": (
        {"network.routes": {"n1": {"address": None, "interface": None}}},
        SEVERAL,
        "error",
        "does not know rank 0's host, n1",
        "launch.master_addr",
    ),
    "little shared memory": (
        {"shared_memory_bytes": 2**26},
        SEVERAL,
        "warning",
        "4 ranks may need 512.0 MiB",
        "--shm-size",
    ),
    "a port in use": (
        {"port_is_free": False},
        Wanted(recipe(master_port=29500), ranks=1),
        "error",
        "29500 is in use",
        "auto",
    ),
    "no recipe": ({"files.recipe.yaml": None}, SEVERAL, "error", "recipe.yaml is not there", "shared"),
    "no model": (
        {"sources.model.name": {"problem": "no such file"}},
        SEVERAL,
        "error",
        "model.name: /m: no such",
        "put it",
    ),
    "not in the cache": (
        {"sources.model.name": hub(cached=False)},
        SEVERAL,
        "warning",
        "org/m is not in the cache yet",
        "hf download org/m",
    ),
    "not in the cache, and offline": (
        {"sources.data.path": hub(cached=False, offline=True)},
        SEVERAL,
        "error",
        "HF_HUB_OFFLINE is set",
        "hf download --repo-type dataset org/m",
    ),
    "a file for a directory": ({"output.is_directory": False}, SEVERAL, "error", "/runs is a file", "another"),
    "a read-only disk": ({"output.is_writable": False}, SEVERAL, "error", "cannot be written to", "another directory"),
    # Two of 12.06 x 1% of 10**9 scalars.
    "no room for two checkpoints": (
        {"output.free_bytes": 230_000_000},
        SEVERAL,
        "error",
        "a checkpoint takes about 115.0 MiB, 2 must fit",
        "save_total_limit",
    ),
    "little room": ({"output.free_bytes": 2**29}, SEVERAL, "warning", "512.0 MiB free for /runs/a", "make room"),
    "hidden GPUs": (
        {"variables": {"CUDA_VISIBLE_DEVICES": "0,1"}},
        SEVERAL,
        "warning",
        "CUDA_VISIBLE_DEVICES=0,1",
        "launch.include",
    ),
    "all GPUs hidden": (
        {"variables": {"CUDA_VISIBLE_DEVICES": ""}},
        Wanted(),
        "warning",
        "hides every GPU",
        "unset it",
    ),
    "GPUs by name": (
        {"variables": {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}},
        Wanted(recipe(), ranks=1),
        "error",
        "DeepSpeed's runner takes numbers only",
        "launch.launcher=torchrun",
    ),
}


@pytest.mark.parametrize("case", ONE_HOST)
def test_what_is_wrong_with_a_host(case):
    changes, wanted, severity, message, remedy = ONE_HOST[case]
    found = only_problem(host_checks.check_host(report(changes), wanted, "n1"))
    assert found.severity == severity
    assert message in found.message
    assert remedy in found.remedy
    assert found.host == "n1"


HARMLESS = {
    "a loopback name, but a way to rank 0": (
        {"network.gloo_address": "127.0.1.1", "network.name_resolves_to": ["127.0.1.1"]},
        SEVERAL,
        "the ranks take eth0, which leads to n1",
    ),
    "a loopback name on a single host": ({"network.gloo_address": "127.0.1.1"}, Wanted(recipe(), ranks=4), "gloo"),
    "an interface that is there": ({"variables": {"GLOO_SOCKET_IFNAME": "eth0"}}, SEVERAL, "by GLOO_SOCKET_IFNAME"),
    "beginnings of names for NCCL": ({"variables": {"NCCL_SOCKET_IFNAME": "ib,eth"}}, SEVERAL, "NCCL"),
    "all interfaces but one for NCCL": ({"variables": {"NCCL_SOCKET_IFNAME": "^docker"}}, SEVERAL, "NCCL"),
    "no checkpoints on a small disk": (
        {"output.free_bytes": 2**30, "sources.model.name": {"scalars": 10**11}},
        Wanted(recipe({"save_strategy": "no"}), ranks=1),
        "1.0 GiB free for /runs/a",
    ),
    "GPUs that Slurm has chosen": (
        {"variables": {"CUDA_VISIBLE_DEVICES": "2", "SLURM_JOB_ID": "7"}},
        Wanted(recipe(), ranks=1),
        "NVIDIA H100",
    ),
    "old GPUs that are not used": ({"torch.bf16": False}, Wanted(recipe({"bf16": True, "use_cpu": True})), "not used"),
    "a free port": ({"port_is_free": True}, Wanted(recipe(master_port=29500), ranks=1), "29500 is free"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_not_wrong_with_a_host(case):
    changes, wanted, message = HARMLESS[case]
    findings = host_checks.check_host(report(changes), wanted, "n1")
    assert problems(findings) == []
    assert any(message in finding.message for finding in findings)


def test_a_login_node_is_not_asked_for_what_ranks_need():
    findings = host_checks.check_host(report({"tools.ninja": None, **NO_ACCELERATOR}), Wanted(has_ranks=False))
    assert {finding.check for finding in findings} == {"versions", "files", "disk"}


# Between hosts


def compare(changes, offset=0.0, use_cpu=False):
    reports = {"n1": report(), "n2": report({"host": "n2", **changes}), "n3": report()}
    return agreement.compare(reports, {"n1": 0.0, "n2": offset}, use_cpu)


def test_hosts_that_agree():
    assert problems(compare({})) == []
    assert any("3 hosts have the same" in finding.message for finding in compare({}))
    assert agreement.compare({"n1": report()}, {"n1": 0.0}) == []


@pytest.mark.parametrize(
    ("changes", "severity", "message", "remedy"),
    [
        ({"versions.torch": "2.12.0"}, "error", "torch is 2.12.0, on n1 2.13.0+cu130", "install torch 2.13.0+cu130"),
        ({"versions.accelerate": "1.14.0"}, "warning", "accelerate is 1.14.0", "install accelerate 1.15.0"),
        ({"versions.python": "3.11.9"}, "warning", "python is 3.11.9", "one Python"),
        ({"versions.python": "3.12.1"}, "error", "python is 3.12.1", "one Python"),
        ({"code": "dead"}, "error", "the source of sparse_zero or rpn is not that of n1", "one commit"),
        ({"files.recipe.yaml": "ff"}, "error", "recipe.yaml is not the file that n1 has", "copy it from n1"),
        ({"sources.model.name": {"content": "ff"}}, "error", "model.name: /m is not what n1 has", "copy it"),
        ({"torch.devices": [{**H100, "name": "V100"}]}, "warning", "has V100, n1 NVIDIA H100", "pace"),
        (NO_ACCELERATOR, "error", "has no accelerator, n1 NVIDIA H100", "launch.exclude"),
        ({"marker_is_seen": False}, "error", "does not see what this machine writes", "NFS"),
    ],
)
def test_where_hosts_differ(changes, severity, message, remedy):
    found = only_problem(compare(changes))
    assert (found.severity, found.host) == (severity, "n2")
    assert message in found.message
    assert remedy in found.remedy


def test_accelerators_may_differ_where_none_is_used():
    assert problems(compare(NO_ACCELERATOR, use_cpu=True)) == []


@pytest.mark.parametrize(("offset", "side"), [(2.5, "2.5 s ahead of"), (-60.0, "60.0 s behind"), (1.9, None)])
def test_clocks(offset, side):
    found = problems(compare({}, offset=offset))
    assert [finding.host for finding in found] == (["n2"] if side else [])
    assert all(finding.severity == "warning" and side in finding.message for finding in found)


@pytest.mark.parametrize(
    ("times", "offset"),
    [
        ((100, 100, 104, 104), 0),  # the same clock
        ((100, 103, 104, 104), 0),  # a slow start proves nothing
        ((100, 110, 111, 104), 7),  # it ended 7 s after we had the answer
        ((100, 90, 91, 104), -10),
    ],
)
def test_a_clock_is_only_off_by_what_cannot_be_waiting(times, offset):
    before, started, ended, after = times
    assert host_queries.clock_offset(before, started, ended, after) == offset


# Hosts that give no report


@pytest.mark.parametrize(
    ("status", "stderr", "message", "remedy"),
    [
        (255, "root@n2: Permission denied (publickey).\n", "Permission denied", "ssh-copy-id n2"),
        (255, "No ED25519 host key is known\nHost key verification failed.", "verification", "ssh-keyscan n2"),
        (255, "ssh: Could not resolve hostname n2: Name or service not known", "resolve", "hostfile"),
        (255, "ssh: connect to host n2 port 22: Connection timed out", "timed out", "ssh n2 true"),
        (71, "bash: cd: /work: No such file or directory", f"has no directory {Path.cwd()}", "share"),
        (72, "bash: module: command not found", "launch.prologue fails: bash: module", "correct it"),
        (127, "bash: /opt/python: No such file", "cannot be run", "environment"),
        (
            1,
            "/opt/python: Error while finding module: No module named 'launcher'",
            "No module named",
            "install sparse-zero",
        ),
        (124, "no answer in 120 s", "gave no report: no answer in 120 s", "launcher.doctor.host_report"),
        (1, "", "gave no report: status 1", "launcher.doctor.host_report"),
    ],
)
def test_why_a_host_gives_no_report(status, stderr, message, remedy):
    found = host_queries.explain("n2", status, stderr)
    assert (found.severity, found.check, found.host) == ("error", "reach", "n2")
    assert message in found.message
    assert remedy in found.remedy


# Around the run


def test_a_deepspeed_environment_file_is_a_trap_where_it_has_other_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "home" / ".deepspeed_env"
    file.parent.mkdir()
    file.write_text("NCCL_DEBUG=INFO\n\n# was: A=1\nUNSET\n")
    found = [*environment.traps({}, file.parent, tmp_path)]
    assert [finding.severity for finding in found] == ["warning"] * 3
    assert "line 2 is blank" in found[0].message
    assert "line 3 is a comment" in found[1].message
    assert "status 0" in found[1].message
    assert "line 4 has no =" in found[2].message
    file.write_text("NCCL_DEBUG=INFO\n")
    assert [finding.severity for finding in environment.traps({}, file.parent, tmp_path)] == ["ok"]
    file.unlink()
    (tmp_path / "named").write_text("\n")
    assert (
        "line 1 is blank" in only_problem(environment.traps({"DS_ENV_FILE": "named"}, file.parent, tmp_path)).message
    )


def test_other_traps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [*environment.traps({"PDSH_RCMD_TYPE": "ssh"}, tmp_path, tmp_path)] == []
    assert (
        "PDSH_RCMD_TYPE=rsh" in only_problem(environment.traps({"PDSH_RCMD_TYPE": "rsh"}, tmp_path, tmp_path)).message
    )
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "hostfile").touch()
    assert "job/hostfile" in only_problem(environment.traps({}, tmp_path, tmp_path)).message


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes PATH hold these programs only, which print a text."""

    def install(**texts):
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        for name, text in texts.items():
            program = directory / name
            program.write_text(f"#!{os.path.realpath('/bin/sh')}\necho '{text}'\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(directory))

    return install


@pytest.mark.parametrize(
    ("launch", "missing"),
    [
        ({"hostfile": "h"}, ["ssh", "pdsh"]),
        ({"hostfile": "h", "launcher": "torchrun"}, ["ssh", "pdsh"]),
        ({"hostfile": "h", "multinode": "openmpi"}, ["ssh", "mpirun", "ompi_info"]),
        ({"hostfile": "h", "launcher": "mpi"}, ["ssh", "mpirun"]),
        ({"launcher": "mpi"}, ["mpirun"]),
        ({}, []),
    ],
)
def test_programs_that_a_launcher_needs(launch, missing, programs):
    programs(other="")
    settings = recipe(**launch).launch
    found = problems(environment.programs(settings))
    assert [finding.message.partition(",")[0] for finding in found] == missing
    assert all(finding.severity == "error" and "apt-get install" in finding.remedy for finding in found)
    programs(**dict.fromkeys(missing, "rcmd modules: rsh,ssh,exec (default: rsh)"))
    assert problems(environment.programs(settings)) == []


def test_pdsh_without_ssh(programs):
    programs(ssh="", pdsh="rcmd modules: rsh,exec (default: rsh)")
    assert "no ssh module" in only_problem(environment.programs(recipe(hostfile="h").launch)).message


# What a host sees


def test_sources_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for directory in ("empty", "model"):
        (tmp_path / directory).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "d.csv").write_text("text,label\n")
    models = {
        name: {"kind": "model", "name": name} for name in ("model", "empty", "./no", "no/such", "package://no/m")
    }
    data = {name: {"kind": "dataset", "name": name} for name in ("d.csv", "e.csv")}
    data["csv"] = {"kind": "dataset", "name": "csv", "files": {"train": ["d.*"], "test": "f.csv"}}
    seen = inputs.look({**models, **data})
    assert {key: source["problem"] for key, source in seen.items() if key != "package://no/m"} == {
        "model": None,
        "empty": "it has no config.json",
        "./no": "no such file or directory",
        "no/such": None,
        "d.csv": None,
        "e.csv": "no such file or directory",
        "csv": "no such file: f.csv",
    }
    assert "'no' is not an installed package" in seen["package://no/m"]["problem"]
    assert (seen["no/such"]["place"], seen["no/such"]["cached"], seen["no/such"]["offline"]) == ("hub", False, True)
    before = seen["model"]["content"]
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert inputs.look(models)["model"]["content"] != before


def test_scalars_are_counted_from_headers(tmp_path):
    import torch
    from safetensors.torch import save_file

    assert inputs.count_scalars(tmp_path) is None
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(7)}, tmp_path / "model-2.safetensors")
    assert inputs.count_scalars(tmp_path) == 23
    (tmp_path / "model-2.safetensors").write_bytes(b"cut")
    assert inputs.count_scalars(tmp_path) is None


def test_a_checkpoint_is_estimated_where_that_is_cheap():
    assert host_checks.checkpoint_bytes(report(), SEVERAL) == 120_600_000
    assert host_checks.checkpoint_bytes(report({"sources.model.name": {"scalars": None}}), SEVERAL) is None
    assert host_checks.checkpoint_bytes(report(), Wanted()) is None
    assert GOOD["sources"]["model.name"]["scalars"] == 10**9, "a test has changed the others' report"
