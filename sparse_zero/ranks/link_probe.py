"""What every rank runs for `sparse-zero doctor`: it meets the others, and measures the links between them.

torchrun --nproc-per-node 2 -m sparse_zero.ranks.link_probe --cpu --seconds 60

Each thing that is found out is a line of JSON on stdout after MARK, at once: where the ranks get stuck, what they have
said before says where. Rank 0's host need not share a disk with whoever reads this.
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
"""Ranks of which every pair is measured; of more, each with the next."""
SMALL_ROUNDS, LARGE_ROUNDS = 50, 5
ENOUGH_SECONDS = 1.0
"""A slow link's large messages are repeated within this time only."""
_MARGIN_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 where the ranks do not meet."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_zero.ranks.link_probe", description="One rank of a measurement."
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="how long the ranks may take to meet, then to measure"
    )
    parser.add_argument("--cpu", action="store_true", help="leave the accelerators alone")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args(argv)
    # Blocked in the network, a rank hears no signal; and nobody may be there to send it one.
    _end_after(2 * options.seconds + _MARGIN_SECONDS)
    try:
        _probe(options.seconds, options.cpu)
    except UserError as error:
        say(problem=str(error))
        return 2
    return 0


def _probe(seconds: float, use_cpu: bool) -> None:
    from sparse_zero.ranks.placement import alone, find_placement

    placement = find_placement() or alone()
    placement.export()
    say(rank=placement.rank, world_size=placement.world_size, host=socket.gethostname())
    import torch.distributed as dist

    from sparse_zero.ranks.rendezvous import meet, open_store

    store = open_store(placement, seconds)
    meet(store, placement, use_cpu, rendezvous_seconds=seconds, timeout_seconds=seconds)
    try:
        measure(placement.rank, placement.world_size)
    finally:
        dist.destroy_process_group()


def say(**facts: Any) -> None:
    """One short line in one write: lines of several ranks must not be mixed."""
    os.write(1, (MARK + json.dumps(facts) + "\n").encode())


def pairs(world_size: int) -> list[tuple[int, int]]:
    """The links to measure: all, or those of a ring."""
    if world_size <= ALL_PAIRS_UP_TO:
        return [(one, other) for one in range(world_size) for other in range(one + 1, world_size)]
    return [(rank, (rank + 1) % world_size) for rank in range(world_size)]


def measure(rank: int, world_size: int) -> None:
    """Say what each link and the group as a whole take. Collective."""
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
        seconds = _typical(_times(lambda values=values: dist.all_reduce(values), rounds, wait, rank, device), size)
        if rank == 0:
            bandwidth = 2 * (world_size - 1) / world_size * size / seconds
            say(collective="all_reduce", bytes=size, seconds=seconds, bytes_per_second=bandwidth, right=right)
        elif not right:
            say(problem=f"rank {rank} on {socket.gethostname()}: an all-reduce of ones gave a wrong sum")


def _measure_link(rank: int, pair: tuple[int, int], device: Any, wait: Callable[[], None]) -> None:
    import torch
    import torch.distributed as dist

    first, second = pair
    sent = torch.arange(LARGE_BYTES // 4, dtype=torch.int32, device=device)
    large, small = torch.zeros_like(sent), torch.zeros(SMALL_BYTES // 4, dtype=torch.int32, device=device)

    def there_and_back(message: Any, answer: Any) -> None:
        if rank == first:
            dist.send(message, second)
            dist.recv(answer, second)
        else:
            dist.recv(answer, first)
            dist.send(answer, first)
        wait()

    small_seconds = _typical(_times(lambda: there_and_back(small, small), SMALL_ROUNDS, wait), SMALL_BYTES)
    started = time.perf_counter()
    there_and_back(sent, large)
    # How often is for the first one to say.
    rounds = torch.tensor([_rounds(time.perf_counter() - started, LARGE_ROUNDS)], dtype=torch.int32, device=device)
    there_and_back(rounds, rounds)
    right = torch.equal(sent, large)
    large_seconds = _typical(_times(lambda: there_and_back(sent, large), int(rounds), wait), LARGE_BYTES)
    if rank == first:
        link = {"from": first, "to": second, "latency_seconds": small_seconds / 2}
        say(link={**link, "bytes_per_second": 2 * LARGE_BYTES / large_seconds, "right": right})


def _rounds(seconds: float, most: int) -> int:
    return max(1, min(most, int(ENOUGH_SECONDS / max(seconds, 1e-9))))


def _typical(seconds: list[float], size: int) -> float:
    """The fastest of small messages, which wait for a core longer than for the network; else the median."""
    return min(seconds) if size == SMALL_BYTES else statistics.median(seconds)


def _times(
    do: Callable[[], Any], rounds: int, wait: Callable[[], None], rank: int | None = None, device: Any = None
) -> list[float]:
    """Seconds of each `do`, after a first one to warm up. With `rank`, all ranks take rank 0's word for how many."""
    started = time.perf_counter()
    do()
    wait()
    if rank is not None:
        import torch
        import torch.distributed as dist

        agreed = torch.tensor([_rounds(time.perf_counter() - started, rounds)], device=device)
        dist.broadcast(agreed, src=0)
        rounds = int(agreed)
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        do()
        wait()
        taken.append(time.perf_counter() - started)
    return taken


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, lambda: os._exit(124))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
