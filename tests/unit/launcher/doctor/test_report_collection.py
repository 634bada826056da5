"""Collecting the hosts' reports: over a stand-in for ssh, the hosts that give none, and their clocks."""

import os
from pathlib import Path

import pytest
from doctor_cases import recipe

from launcher.doctor import report_collection


@pytest.mark.usefixtures("good_machine")
def test_real_reports_over_a_stand_in_for_ssh(monkeypatch, tmp_path):
    """n1 allows the login and prints a welcome; n2 refuses the login."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> {tmp_path}/words\n"
        "for word; do host=$last; last=$word; done\n"
        'if [ "$host" = n2 ]; then echo "Permission denied (publickey)." >&2; exit 255; fi\n'
        'echo Welcome\ncd /\nexec sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    launch = recipe(
        environment={"NCCL_SOCKET_IFNAME": "it's $HOME"},
        prologue=["CUDA_VISIBLE_DEVICES=3; echo loading", "export CUDA_VISIBLE_DEVICES"],
    ).launch
    request = {"files": ["recipe.yaml", "no 'file'"], "output": "out"}
    first, second = report_collection.collect_over_ssh(["n1", "n2"], [request, request], launch)
    assert first.problem is None
    assert first.clock_offset == 0
    assert first.report["files"]["recipe.yaml"]
    assert first.report["files"]["no 'file'"] is None
    assert first.report["output"]["existing"] == str(tmp_path)
    assert first.report["variables"]["NCCL_SOCKET_IFNAME"] == "it's $HOME"
    assert first.report["variables"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert first.report["torch"] is None, "torch was not requested"
    assert (second.report, second.problem.host) == (None, "n2")
    assert "ssh-copy-id n2" in second.problem.remedy
    words = (tmp_path / "words").read_text()
    assert "n1" in words
    assert "it's" not in words, "a value is in a command line"

    [refused] = report_collection.collect_over_ssh(["n1"], [request], recipe(prologue=["false"]).launch)
    assert "launch.prologue" in refused.problem.message


@pytest.mark.parametrize(
    ("status", "stderr", "message", "remedy"),
    [
        (255, "root@n2: Permission denied (publickey).\n", "Permission denied", "ssh-copy-id n2"),
        (255, "No ED25519 host key is known\nHost key verification failed.", "verification", "ssh-keyscan n2"),
        (255, "ssh: Could not resolve hostname n2: Name or service not known", "resolve", "hostfile"),
        (255, "ssh: connect to host n2 port 22: Connection timed out", "timed out", "ssh n2 true"),
        (71, "bash: cd: /work: No such file or directory", f"has no directory {Path.cwd()}", "share"),
        (72, "bash: module: command not found", "launch.prologue fails: bash: module", "correct launch.prologue"),
        (127, "bash: /opt/python: No such file", "cannot be run", "environment"),
        (
            1,
            "/opt/python: Error while finding module: No module named 'launcher'",
            "No module named",
            "version of sparse-zero",
        ),
        (124, "no answer in 120 s", "gave no report: no answer in 120 s", "launcher.doctor.host_report"),
        (1, "", "gave no report: status 1", "launcher.doctor.host_report"),
    ],
)
def test_why_a_host_gives_no_report(status, stderr, message, remedy):
    found = report_collection.explain_failure("n2", status, stderr)
    assert (found.severity, found.check, found.host) == ("error", "reachability", "n2")
    assert message in found.message
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("times", "offset"),
    [
        ((100, 100, 104, 104), 0),  # the same clock
        ((100, 103, 104, 104), 0),  # a slow start is no offset
        ((100, 110, 111, 104), 7),  # it ended 7 s after we received the response
        ((100, 90, 91, 104), -10),
    ],
)
def test_clock_offsets(times, offset):
    before, started, ended, after = times
    assert report_collection.clock_offset(before, started, ended, after) == offset
