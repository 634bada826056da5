"""Each problem that a single host can have is found if the host has it, and only then."""

import pytest
from doctor_cases import GOOD, NO_ACCELERATOR, only_problem, problems, recipe, report

from launcher.doctor import host_checks
from launcher.doctor.host_checks import HostRequirements

SEVERAL = HostRequirements(recipe(), ranks=4, several_hosts=True, master="n1")


@pytest.mark.parametrize(
    "wanted", [HostRequirements(), SEVERAL, HostRequirements(recipe({"bf16": True, "use_cpu": True}), ranks=8)]
)
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
    "torch is broken": ({"torch": {"problem": "OSError: libcudart"}}, SEVERAL, "error", "libcudart", "reinstall"),
    "no compiler, but the GPUs need none": (
        {"tools.g++": None},
        SEVERAL,
        "warning",
        "g++ is not installed",
        "apt-get install g++",
    ),
    "no compiler for a new operator": (
        {**NO_ACCELERATOR, "tools.g++": None, "operators": []},
        HostRequirements(recipe(), ranks=2),
        "error",
        "DeepSpeed cannot load deepspeed_shm_comm",
        "apt-get install g++",
    ),
    "no compiler for offloading": (
        {"tools.g++": None, "operators": []},
        HostRequirements(recipe({"deepspeed": "configs/zero3_offload.json"}), ranks=2),
        "error",
        "cpu_adam",
        "g++",
    ),
    "no ninja for a built operator": (
        {**NO_ACCELERATOR, "tools.ninja": None},
        HostRequirements(recipe(), ranks=2),
        "error",
        "ninja is not installed",
        "PATH",
    ),
    "too many ranks": ({}, HostRequirements(recipe(), ranks=5), "error", "5 ranks, but 4 accelerators", "slots=4"),
    "an old GPU": (
        {"torch.bf16": False},
        HostRequirements(recipe({"bf16": True}), ranks=4),
        "error",
        "NVIDIA H100 does not support bfloat16",
        "training.bf16=false",
    ),
    "torch sees no GPU": (
        {"torch": NO_ACCELERATOR["torch"]},
        HostRequirements(recipe(), ranks=2),
        "warning",
        "/dev/nvidia0 exists, but torch (built for CPU) finds no device",
        "driver",
    ),
    "too few cores": (
        NO_ACCELERATOR,
        HostRequirements(recipe(), ranks=9),
        "warning",
        "9 ranks share 8 CPU cores",
        "8 or fewer",
    ),
    "no NCCL": ({"torch.nccl": None}, SEVERAL, "error", "without NCCL", "CUDA build"),
    "no gloo": ({"torch.gloo": False}, SEVERAL, "error", "without gloo", "standard build"),
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
        "use one of eth0",
    ),
    "no such interface for NCCL": (
        {"variables": {"NCCL_SOCKET_IFNAME": "ib"}},
        SEVERAL,
        "error",
        "NCCL_SOCKET_IFNAME=ib matches no interface",
        "eth0",
    ),
    "an unknown rank 0": (
        {"network.routes": {"n1": {"address": None, "interface": None}}},
        SEVERAL,
        "error",
        "cannot resolve n1, the host of rank 0",
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
        HostRequirements(recipe(master_port=29500), ranks=1),
        "error",
        "29500 is in use",
        "auto",
    ),
    "no recipe": ({"files.recipe.yaml": None}, SEVERAL, "error", "recipe.yaml does not exist", "shared"),
    "no model": (
        {"sources.model.name": {"problem": "no such file"}},
        SEVERAL,
        "error",
        "model.name: /m: no such",
        "copy it",
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
    "a read-only disk": ({"output.is_writable": False}, SEVERAL, "error", "is not writable", "another directory"),
    # Two of 12.06 x 1% of 10**9 scalars.
    "no room for two checkpoints": (
        {"output.free_bytes": 230_000_000},
        SEVERAL,
        "error",
        "a checkpoint is about 115.0 MiB, and 2 must fit",
        "save_total_limit",
    ),
    "little room": ({"output.free_bytes": 2**29}, SEVERAL, "warning", "512.0 MiB free for /runs/a", "free disk space"),
    "hidden GPUs": (
        {"variables": {"CUDA_VISIBLE_DEVICES": "0,1"}},
        SEVERAL,
        "warning",
        "CUDA_VISIBLE_DEVICES=0,1",
        "launch.include",
    ),
    "all GPUs hidden": (
        {"variables": {"CUDA_VISIBLE_DEVICES": ""}},
        HostRequirements(),
        "warning",
        "hides every GPU",
        "unset it",
    ),
    "GPUs by name": (
        {"variables": {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}},
        HostRequirements(recipe(), ranks=1),
        "error",
        "DeepSpeed's runner accepts numbers only",
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
    "a loopback name, but a route to rank 0": (
        {"network.gloo_address": "127.0.1.1", "network.name_resolves_to": ["127.0.1.1"]},
        SEVERAL,
        "the ranks use eth0, which reaches n1",
    ),
    "a loopback name on a single host": (
        {"network.gloo_address": "127.0.1.1"},
        HostRequirements(recipe(), ranks=4),
        "gloo",
    ),
    "an interface that is there": (
        {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}},
        SEVERAL,
        "as GLOO_SOCKET_IFNAME says",
    ),
    "prefixes of names for NCCL": ({"variables": {"NCCL_SOCKET_IFNAME": "ib,eth"}}, SEVERAL, "NCCL"),
    "all interfaces but one for NCCL": ({"variables": {"NCCL_SOCKET_IFNAME": "^docker"}}, SEVERAL, "NCCL"),
    "no checkpoints on a small disk": (
        {"output.free_bytes": 2**30, "sources.model.name": {"scalars": 10**11}},
        HostRequirements(recipe({"save_strategy": "no"}), ranks=1),
        "1.0 GiB free for /runs/a",
    ),
    "GPUs that Slurm has chosen": (
        {"variables": {"CUDA_VISIBLE_DEVICES": "2", "SLURM_JOB_ID": "7"}},
        HostRequirements(recipe(), ranks=1),
        "NVIDIA H100",
    ),
    "old GPUs that are not used": (
        {"torch.bf16": False},
        HostRequirements(recipe({"bf16": True, "use_cpu": True})),
        "not used",
    ),
    "a free port": ({"port_is_free": True}, HostRequirements(recipe(master_port=29500), ranks=1), "29500 is free"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_not_wrong_with_a_host(case):
    changes, wanted, message = HARMLESS[case]
    findings = host_checks.check_host(report(changes), wanted, "n1")
    assert problems(findings) == []
    assert any(message in finding.message for finding in findings)


def test_a_login_node_needs_nothing_for_ranks():
    findings = host_checks.check_host(
        report({"tools.ninja": None, **NO_ACCELERATOR}), HostRequirements(has_ranks=False)
    )
    assert {finding.check for finding in findings} == {"versions", "files", "disk"}


def test_the_size_of_a_checkpoint():
    assert host_checks.checkpoint_bytes(report(), SEVERAL) == 120_600_000
    assert host_checks.checkpoint_bytes(report({"sources.model.name": {"scalars": None}}), SEVERAL) is None
    assert host_checks.checkpoint_bytes(report(), HostRequirements()) is None
    assert GOOD["sources"]["model.name"]["scalars"] == 10**9, "a test has changed the others' report"
