"""Each difference between hosts is found."""

import pytest
from doctor_cases import H100, NO_ACCELERATOR, only_problem, problems, report

from launcher.doctor.host_comparison import compare_hosts


def compare(changes, offset=0.0, use_cpu=False):
    reports = {"n1": report(), "n2": report({"host": "n2", **changes}), "n3": report()}
    return compare_hosts(reports, {"n1": 0.0, "n2": offset}, use_cpu)


def test_hosts_that_agree():
    assert problems(compare({})) == []
    assert any("3 hosts have the same" in finding.message for finding in compare({}))
    assert compare_hosts({"n1": report()}, {"n1": 0.0}) == []


@pytest.mark.parametrize(
    ("changes", "severity", "message", "remedy"),
    [
        (
            {"versions.torch": "2.12.0"},
            "error",
            "torch is 2.12.0, but 2.13.0+cu130 on n1",
            "install torch 2.13.0+cu130",
        ),
        ({"versions.accelerate": "1.14.0"}, "warning", "accelerate is 1.14.0", "install accelerate 1.15.0"),
        ({"versions.python": "3.11.9"}, "warning", "python is 3.11.9", "same Python"),
        ({"versions.python": "3.12.1"}, "error", "python is 3.12.1", "same Python"),
        ({"code": "dead"}, "error", "the source code of sparse_zero or rpn differs from that on n1", "same commit"),
        ({"files.recipe.yaml": "ff"}, "error", "recipe.yaml differs from the file on n1", "copy it from n1"),
        ({"sources.model.name": {"content": "ff"}}, "error", "model.name: /m differs from that on n1", "copy it"),
        ({"torch.devices": [{**H100, "name": "V100"}]}, "warning", "has V100, but n1 has NVIDIA H100", "slowest"),
        (NO_ACCELERATOR, "error", "has no accelerator, but n1 has NVIDIA H100", "launch.exclude"),
        ({"marker_is_seen": False}, "error", "does not see a file that this machine wrote", "NFS"),
    ],
)
def test_hosts_that_differ(changes, severity, message, remedy):
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
