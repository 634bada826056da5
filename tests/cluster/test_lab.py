"""The lab itself: its hosts are hosts, its cables can be pulled, its Slurm queues, and it leaves nothing."""

import re
from pathlib import Path

import pytest
from lab import Hosts
from lab_slurm import Slurm

pytestmark = pytest.mark.cluster


def reaches(hosts: Hosts, source: str, target: str) -> bool:
    return hosts[source].run("ssh", "-o", "ConnectTimeout=1", target, "true", status=None).status == 0


def test_a_host_has_its_own_name_processes_and_memory(hosts: Hosts) -> None:
    first, second = hosts["n1"], hosts["n2"]
    assert first.run("ssh", "n2", "hostname; hostname -i").output.split() == ["n2", second.address]
    waiting = first.start("sleep", 300)
    try:
        first.run("touch", "/dev/shm/a-file", "/run/a-file")
        assert "sleep" in first.run("ps", "ax").output
        assert "sleep" not in second.run("ps", "ax").output
        assert [process.pid for process in first.processes("sleep", "300")] == [waiting.process.pid]
        assert second.run("ls", "/dev/shm/a-file", "/run/a-file", status=None).status == 2
    finally:
        waiting.end()


def test_files_and_environment_are_the_same_on_all_hosts(hosts: Hosts, tmp_path: Path) -> None:
    hosts["n1"].run("sh", "-c", "echo there > here", cwd=tmp_path)
    assert hosts["n2"].run("cat", tmp_path / "here").output == "there\n"
    asked = "echo $HOME $PATH $PYTHONPATH $OMP_NUM_THREADS"
    assert hosts["n1"].run("ssh", "n2", asked).output == hosts["n1"].run("sh", "-c", asked).output


def test_a_command_that_does_not_end_is_ended(hosts: Hosts) -> None:
    with pytest.raises(AssertionError, match=r"n1\$ sh -c .*\nhad not ended after 0.5 s; it printed\nsleeping"):
        hosts["n1"].run("sh", "-c", "echo sleeping; sleep 300; true", timeout=0.5)
    with pytest.raises(AssertionError, match="ended with status 3; it printed\nworse"):
        hosts["n1"].run("sh", "-c", "echo worse; exit 3")


def test_what_a_test_leaves_is_found_and_ended(hosts: Hosts) -> None:
    hosts["n1"].run("ssh", "n2", "sleep 300 >/dev/null 2>&1 &")
    assert hosts.end_strays(grace_seconds=0.1) == ["n2: sleep 300"]
    assert hosts.end_strays(grace_seconds=0) == []


def test_a_pulled_cable_isolates_one_host(hosts: Hosts) -> None:
    hosts["n2"].unplug()
    assert not reaches(hosts, "n1", "n2")
    assert not reaches(hosts, "n2", "n1")
    assert reaches(hosts, "n1", "n3")
    hosts["n2"].plug()
    assert reaches(hosts, "n1", "n2")


def test_a_killed_host_is_gone_and_boots_again(hosts: Hosts) -> None:
    waiting = hosts["n3"].start("sleep", 300)
    hosts["n3"].run("touch", "/run/a-file")
    hosts["n3"].kill()
    assert waiting.status == -9
    assert not reaches(hosts, "n1", "n3")
    hosts["n3"].boot()
    assert hosts["n1"].run("ssh", "n3", "hostname; ls /run/a-file", status=2).output.startswith("n3\n")


def test_a_job_of_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("-N2", "--wrap", "srun hostname", cwd=tmp_path)
    assert slurm.wait(job, 30)["ExitCode"] == "0:0"
    assert sorted(slurm.output(job).split()) == ["n1", "n2"]


def test_a_job_is_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    script = "echo start ${SLURM_RESTART_COUNT:-0}; [ $SLURM_RESTART_COUNT ] || sleep 300"
    job = slurm.submit("--open-mode=append", "--wrap", script, cwd=tmp_path)
    slurm.wait_for(job, lambda _: "start 0" in slurm.output(job), 30, "has started")
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait(job, 40)["Restarts"] == "1"
    assert re.findall("start [01]", slurm.output(job)) == ["start 0", "start 1"]


def test_slurm_goes_on_after_a_node_was_killed(hosts: Hosts, slurm: Slurm) -> None:
    hosts["n2"].kill()
    hosts.heal()
    assert slurm.run("srun", "-N2", "hostname", timeout=30).output.split().count("n2") == 1


@pytest.mark.usefixtures("hosts")
def test_a_second_lab_beside_the_first_leaves_nothing(tmp_path: Path) -> None:
    lab = Hosts(tmp_path, ["n1", "n2"])
    try:
        waiting = lab["n1"].start("sh", "-c", "sleep 300 & sleep 301")
        lab["n1"].run("ssh", "n2", "sleep 302 >/dev/null 2>&1 &")
        assert lab["n2"].processes("sleep")
        assert lab.left_over() != []
    finally:
        lab.close()
    assert waiting.status == -9
    assert lab.left_over() == []
