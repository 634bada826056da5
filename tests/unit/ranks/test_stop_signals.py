"""What a rank does on SIGTERM and SIGUSR1."""

import signal
import subprocess
import sys
import time

import pytest

from sparse_zero.ranks.stop_signals import _SAME_REQUEST_SECONDS, STOPPED

RANK = """
import os, sys, time
from sparse_zero.ranks.stop_signals import StopRequest
stop = StopRequest().install_handlers()
if sys.argv[1] == "loading":
    print("ready", flush=True)
    for _ in range(3000):  # a signal just before one long sleep would wait for its end
        time.sleep(0.01)
with stop.deferred():
    print("ready", flush=True)
    while not stop.is_raised:
        time.sleep(0.01)
    print("requested", flush=True)
    time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


def rank(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", RANK, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_signal_ends_the_rank(signum: int) -> None:
    process = rank("loading")
    process.send_signal(signum)
    assert process.wait(20) == STOPPED


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_in_training_the_first_signal_only_sets_the_request(signum: int) -> None:
    process = rank("training", "0")
    process.send_signal(signum)
    assert process.stdout.readline() == "requested\n"
    assert process.wait(20) == 7


def test_a_second_signal_ends_the_rank_at_once() -> None:
    process = rank("training", "30")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "requested\n"
    time.sleep(_SAME_REQUEST_SECONDS + 0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_the_same_request_may_arrive_twice() -> None:
    """From the scheduler, and from the launcher that forwards it."""
    process = rank("training", "1")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "requested\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7
