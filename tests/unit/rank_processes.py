"""Ranks as processes that join a watchdog and do what a test tells them, without any training."""

import json
import subprocess
import sys
import time
from collections.abc import Callable

from sparse_zero.ranks.watchdog import Address, Watchdog

SECONDS = 20
"""Timeout of whatever a test waits for."""

RANK = """
import contextlib, json, os, sys, time
from sparse_zero.ranks.failures import RankInfo
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.watchdog import Address, Watchdog
from sparse_zero.ranks.watchdog_client import WatchdogClient, print_outcome

rank, world_size, host, owner, address, is_deferred = json.loads(sys.argv[1])
stop = StopRequest().install_handlers()
watchdog = None if address else Watchdog(print_outcome, silence_seconds=30)
address = address or str(watchdog.address)
info = RankInfo(rank, host, os.getpid(), f"logs/{rank}")
client = WatchdogClient(Address.parse(address), info, world_size, stop, 30, owner=owner, watchdog=watchdog)
with stop.deferred() if is_deferred else contextlib.nullcontext():
    print(address, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "report failure":
            client.report_failure(*arguments)
        elif command == "report lost launcher":
            client.report_lost_launcher(*arguments)
        elif command == "leave":
            client.leave(*arguments)
        elif command == "wait for a stop request":
            deadline = time.monotonic() + 20
            while not stop.is_raised and time.monotonic() < deadline:
                time.sleep(0.01)
            print("requested" if stop.is_raised else "not requested", flush=True)
        elif command == "wait until all have joined":
            while client._rank_0_host == "its host":
                time.sleep(0.01)
            print("all have joined", flush=True)
        elif command == "exit":
            sys.exit(*arguments)
"""


class RankProcess:
    """A rank that executes the commands that it is sent."""

    def __init__(
        self,
        rank: int,
        address: Address | str | None,
        world_size: int = 3,
        host: str = "n1",
        owner: str = "launcher",
        deferred: bool = False,
    ) -> None:
        """Start the process.

        Args:
            address: of the watchdog; None: the rank runs one.
            deferred: whether the rank defers a request to stop, as during training.
        """
        arguments = json.dumps([rank, world_size, host, owner, str(address or ""), deferred])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", RANK, arguments], **pipes)

    def wait_until_joined(self) -> str:
        """Returns the address of its watchdog."""
        return self.process.stdout.readline().strip()

    def send(self, *command: object) -> None:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[int, str]:
        """Returns its exit status and what it has written to stderr."""
        # Its standard input stays open, because it would exit at the end of it.
        return self.process.wait(timeout=SECONDS), self.process.stderr.read()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_three(start: Callable[..., RankProcess], watchdog: Watchdog, **settings: object) -> list[RankProcess]:
    """Start ranks 0 to 2 and wait until all have joined the watchdog."""
    ranks = [start(rank, watchdog.address, **settings) for rank in range(3)]
    assert [rank.wait_until_joined() for rank in ranks] == [str(watchdog.address)] * 3
    wait_until(lambda: len(watchdog.ranks) == 3)
    return ranks
