"""The program that `sparse-zero doctor` runs on every rank: a rendezvous, then measurements of the network links.

torchrun --nproc-per-node 2 -m sparse_zero.ranks.link_probe --cpu --seconds 60

Each result is printed to stdout at once, as one line of JSON after MARK. If the ranks hang, the lines so far
show where. The results go through stdout because the hosts need not share a disk with the process that reads them.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sparse_zero.errors import UserError

MARK = "sparse-zero-probe: "
SMALL_BYTES, LARGE_BYTES = 4, 2**24
ALL_PAIRS_UP_TO = 8
"""The largest world size at which every pair of ranks is measured. With more ranks, each is measured with the next."""
SMALL_ROUNDS, LARGE_ROUNDS = 50, 5
ENOUGH_SECONDS = 1.0
"""Time limit for the repetitions of a measurement: on a slow link, large messages are repeated less often."""
_MARGIN_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run the probe.

    Returns:
        The exit status: 0, or 2 if the rendezvous fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sparse_zero.ranks.link_probe", description="One rank of a measurement of the links."
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="time limit for the rendezvous, and as long for the measurements",
    )
    parser.add_argument("--cpu", action="store_true", help="do not use accelerators")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args(argv)
    # A rank that blocks in a network call handles no signals, and there may be no process to send it one.
    _exit_after(2 * options.seconds + _MARGIN_SECONDS)
    try:
        _probe(options.seconds, options.cpu)
    except UserError as error:
        emit(problem=str(error))
        return 2
    return 0


def _probe(seconds: float, use_cpu: bool) -> None:
    from sparse_zero.ranks.placement import Placement

    placement = Placement.from_environment() or Placement.single_process()
    placement.export()
    emit(rank=placement.rank, world_size=placement.world_size, host=socket.gethostname())
    import torch.distributed as dist

    from sparse_zero.ranks.rendezvous import init_process_group, open_store

    store = open_store(placement, seconds)
    init_process_group(store, placement, use_cpu, rendezvous_seconds=seconds, timeout_seconds=seconds)
    try:
        measure(placement.rank, placement.world_size)
    finally:
        dist.destroy_process_group()


def emit(**facts: Any) -> None:
    """Print one result. One short line in one write, so that the lines of several ranks are not mixed."""
    os.write(1, (MARK + json.dumps(facts) + "\n").encode())


def pairs(world_size: int) -> list[tuple[int, int]]:
    """The pairs of ranks to measure: all of them or, for a large world size, those of a ring."""
    if world_size <= ALL_PAIRS_UP_TO:
        return [(one, other) for one in range(world_size) for other in range(one + 1, world_size)]
    return [(rank, (rank + 1) % world_size) for rank in range(world_size)]


def measure(rank: int, world_size: int) -> None:
    """Measure and print the latency and bandwidth of each link, and of an all-reduce. Collective."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if dist.get_backend() != "gloo":
        device = torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    one = torch.ones(SMALL_BYTES // 4, device=device)
    for pair in pairs(world_size):
        dist.all_reduce(one.clone())  # one link at a time
        wait()
        if rank in pair:
            _measure_link(rank, pair, device, wait)
    for size, rounds in ((SMALL_BYTES, SMALL_ROUNDS), (LARGE_BYTES, LARGE_ROUNDS)):
        values = torch.ones(size // 4, device=device)
        dist.all_reduce(values)
        right = bool((values == world_size).all())
        seconds = _typical(_durations(lambda values=values: dist.all_reduce(values), rounds, wait, rank, device), size)
        if rank == 0:
            bandwidth = 2 * (world_size - 1) / world_size * size / seconds
            emit(collective="all_reduce", bytes=size, seconds=seconds, bytes_per_second=bandwidth, right=right)
        elif not right:
            emit(problem=f"rank {rank} on {socket.gethostname()}: an all-reduce of ones returned a wrong sum")


def _measure_link(rank: int, pair: tuple[int, int], device: Any, wait: Callable[[], None]) -> None:
    import torch
    import torch.distributed as dist

    first, second = pair
    sent = torch.arange(LARGE_BYTES // 4, dtype=torch.int32, device=device)
    large, small = torch.zeros_like(sent), torch.zeros(SMALL_BYTES // 4, dtype=torch.int32, device=device)

    def round_trip(message: Any, answer: Any) -> None:
        if rank == first:
            dist.send(message, second)
            dist.recv(answer, second)
        else:
            dist.recv(answer, first)
            dist.send(answer, first)
        wait()

    small_seconds = _typical(_durations(lambda: round_trip(small, small), SMALL_ROUNDS, wait), SMALL_BYTES)
    started = time.perf_counter()
    round_trip(sent, large)
    # The first rank of the pair decides on the number of rounds.
    rounds = torch.tensor([_rounds(time.perf_counter() - started, LARGE_ROUNDS)], dtype=torch.int32, device=device)
    round_trip(rounds, rounds)
    right = torch.equal(sent, large)
    large_seconds = _typical(_durations(lambda: round_trip(sent, large), int(rounds), wait), LARGE_BYTES)
    if rank == first:
        link = {"from": first, "to": second, "latency_seconds": small_seconds / 2}
        emit(link={**link, "bytes_per_second": 2 * LARGE_BYTES / large_seconds, "right": right})


def _rounds(seconds: float, most: int) -> int:
    return max(1, min(most, int(ENOUGH_SECONDS / max(seconds, 1e-9))))


def _typical(seconds: list[float], size: int) -> float:
    """The median; for small messages the minimum, since they wait longer for a core than for the network."""
    return min(seconds) if size == SMALL_BYTES else statistics.median(seconds)


def _durations(
    operation: Callable[[], Any], rounds: int, wait: Callable[[], None], rank: int | None = None, device: Any = None
) -> list[float]:
    """The duration of each call of `operation`, in seconds, after one warm-up call.

    With `rank`, rank 0 decides for all ranks how many calls are measured.
    """
    started = time.perf_counter()
    operation()
    wait()
    if rank is not None:
        import torch
        import torch.distributed as dist

        agreed = torch.tensor([_rounds(time.perf_counter() - started, rounds)], device=device)
        dist.broadcast(agreed, src=0)
        rounds = int(agreed)
    durations = []
    for _ in range(rounds):
        started = time.perf_counter()
        operation()
        wait()
        durations.append(time.perf_counter() - started)
    return durations


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, lambda: os._exit(124))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
