"""Starts ranks on this machine, as direct children of this process.

    python -m launcher.ways.local_ranks --processes 2 --master-port 29500 -m sparse_zero.train demo.yaml

The exit status is that of the first rank that fails. The others then get SIGTERM, and SIGKILL after 30 seconds.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 30.0


def main() -> int:
    """Start the ranks, wait for them and return the exit status; 128 + n if signal n killed the first failed rank."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.ways.local_ranks", description="Start ranks on this machine."
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument(
        "-m", dest="words", nargs=argparse.REMAINDER, required=True, help="the module and its arguments"
    )
    options = parser.parse_args()
    ranks: list[subprocess.Popen] = []
    # Forwarded: this process must outlive the ranks, to return their exit status.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: [_send(rank, number) for rank in ranks])
    for rank in range(options.processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(options.processes),
            "LOCAL_WORLD_SIZE": str(options.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(options.master_port),
        }
        ranks.append(subprocess.Popen([sys.executable, "-u", "-m", *options.words], env=environment))
    status, deadline = 0, None
    while running := [rank for rank in ranks if rank.poll() is None]:
        failed = [rank.returncode for rank in ranks if rank.returncode not in (None, 0)]
        if failed and deadline is None:
            status, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            for rank in running:
                _send(rank, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(0.05)
    status = status or next((rank.returncode for rank in ranks if rank.returncode != 0), 0)
    return 128 - status if status < 0 else status


def _send(rank: subprocess.Popen, signum: int) -> None:
    if rank.poll() is None:
        rank.send_signal(signum)


if __name__ == "__main__":
    sys.exit(main())
