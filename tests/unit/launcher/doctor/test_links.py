"""What the link probe measures: parsing its output, and the problems that are found in it."""

import os
import subprocess
import sys

import pytest
from doctor_cases import all_reduce, link, probe_output, started

from launcher.doctor import links
from sparse_zero.ranks.link_probe import MARK, pairs


def problems_in(output, status=0):
    return [finding for finding in links.check_links(links.parse_output(output, status)) if finding.severity != "ok"]


def test_links_without_problems():
    hosts = ["n1", "n1", "n2"]
    output = probe_output(*started(hosts), *(link(*pair) for pair in pairs(3)), *all_reduce())
    assert problems_in(output) == []
    [found] = links.check_links(links.parse_output(output, 0))
    assert found.message == "3 ranks on 2 hosts connected; all-reduce 953.7 MiB/s"
    # pdsh prefixes the host, and two ranks may print on the same line.
    merged = probe_output(*started(hosts), *(link(*pair) for pair in pairs(3)), prefix="n1: ").replace("}\nn1: ", "}")
    assert links.parse_output(merged + probe_output(*all_reduce()), 0) == links.parse_output(output, 0)


@pytest.mark.parametrize(
    ("output", "severity", "message"),
    [
        ("n1: command not found\n\n", "error", "the launcher started no rank (status 1): n1: command not found"),
        (
            "n2: DistError: timed out\nn2: \npdsh: ssh exited\n",
            "error",
            "no rank (status 1): n2: DistError: timed out",
        ),
        (probe_output(*started(["n1", "n2"])[:1]), "error", "rank 1 of 2 did not start; the ranks on n1 did"),
        (
            probe_output(*started(["n1", "n2"]), {"problem": "rank 1 on n2 cannot reach rank 0"}) * 2,
            "error",
            "rank 1 on n2 cannot reach rank 0",
        ),
        (
            probe_output(*started(["n1", "n2", "n3"]), link(0, 1)) + "terminated\n",
            "error",
            "did not finish measuring (first missing: n1 (rank 0) - n3 (rank 2)): terminated",
        ),
        (probe_output(*started(["n1", "n2"])), "error", "the ranks started, but did not finish measuring"),
        (probe_output(*started(["n1", "n2"]), link(0, 1), *all_reduce()), "warning", "exited with status 1"),
    ],
)
def test_ranks_that_do_not_finish(output, severity, message):
    [found] = problems_in(output, status=1)
    assert (found.severity, found.check) == (severity, "ranks")
    assert message in found.message
    assert found.remedy


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"rate": 2e8}, "n1 (rank 0) - n3 (rank 2): 190.7 MiB/s; the median is 953.7 MiB/s"),
        ({"latency": 1e-3}, "n1 (rank 0) - n3 (rank 2): 1,000 us; the median is 50 us"),
        ({"right": False}, "n1 (rank 0) - n3 (rank 2): corrupts data"),
    ],
)
def test_an_outlier_among_the_links(odd, message):
    found = problems_in(
        probe_output(*started(["n1", "n2", "n3"]), link(0, 1), link(0, 2, **odd), link(1, 2), *all_reduce())
    )
    assert [finding.message for finding in found] == [message]


def test_slow_links_between_hosts_but_not_within_one():
    def both(**odd):
        return probe_output(*started(["n1", "n1"]), link(0, 1, **odd), *all_reduce()), probe_output(
            *started(["n1", "n2"]), link(0, 1, **odd), *all_reduce()
        )

    for odd in ({"rate": 9e7}, {"latency": 3e-3}):
        within, between = both(**odd)
        assert problems_in(within) == []
        assert len(problems_in(between)) == 1


def test_a_wrong_sum():
    found = problems_in(probe_output(*started(["n1", "n2"]), link(0, 1), *all_reduce(right=False)))
    assert [finding.message for finding in found] == ["an all-reduce of ones gave a wrong sum"]


def test_pairs():
    assert pairs(1) == []
    assert pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(pairs(8)) == 28
    assert pairs(9) == [(rank, (rank + 1) % 9) for rank in range(9)]


def test_the_processes_of_a_probe_that_hangs_are_killed():
    code = f'import subprocess, time; print(\'{MARK}\' + \'{{"rank": 0, "world_size": 2, "host": "n1"}}\', flush=True)'
    sleep = f"sleep 987.{os.getpid()}"  # no other test run has this one
    code += f"; subprocess.run({sleep.split()}); time.sleep(987)"
    measured = links.measure(links.Command([sys.executable, "-c", code], {}), seconds=1.5)
    assert measured.status is None
    assert measured.hosts == {0: "n1"}
    assert subprocess.run(["pgrep", "-x", "-f", sleep], capture_output=True).stdout == b""
