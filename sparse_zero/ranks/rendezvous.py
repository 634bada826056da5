"""A rank meets the others: torch's process group, and the watchdog that notices when one of them is gone.

This comes first, before the imports, data and model that take minutes, so that a rank which dies in any of them is
noticed too.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sparse_zero.errors import UserError
from sparse_zero.ranks.extension_locks import remove_abandoned_locks
from sparse_zero.ranks.failures import Member, Outcome
from sparse_zero.ranks.network import address_towards, interface_towards
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.watchdog import Address, Watchdog
from sparse_zero.ranks.watchdog_client import WatchdogClient


def open_store(placement: Placement, rendezvous_seconds: float = 300) -> dist.Store:
    """The store at which all ranks meet, kept by rank 0, or by torchrun's agent.

    Raises UserError: rank 0's port is taken; rank 0 cannot be reached.
    """
    # torchrun's agent keeps a store already, and keeps it over its restarts.
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            placement.master_addr,
            placement.master_port,
            is_master=placement.rank == 0 and not has_agent,
            timeout=timedelta(seconds=rendezvous_seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {placement.master_port} on {socket.gethostname()}, where the ranks meet, is in use by another "
                "program; give launch.master_port (or MASTER_PORT) another, or auto"
            ) from None
        raise UserError(
            f"rank {placement.rank} on {socket.gethostname()} cannot reach rank 0 at "
            f"{placement.master_addr}:{placement.master_port} within {rendezvous_seconds:g} s "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    return dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def meet(
    store: dist.Store,
    placement: Placement,
    use_cpu: bool,
    backend: str | None = None,
    facts: Mapping[str, str] | None = None,
    nodes: int | None = None,
    rendezvous_seconds: float = 300,
    timeout_seconds: float = 1800,
) -> None:
    """Start torch's process group. Collective.

    Args:
        backend: None: the one of this machine's accelerator.
        facts: what must be the same on all ranks, by its name.
        nodes: how many hosts the ranks must be on; None: any number.
        timeout_seconds: of the group's collectives.

    Raises UserError: some rank (it says which) did not come, or differs; ranks on other than `nodes` hosts.
    """
    device = None if use_cpu else _choose_device(placement)
    if backend is None:
        backend = "gloo" if device is None else dist.get_default_backend_for_device(device)
    remove_abandoned_locks()
    store.set(f"came/{placement.rank}", json.dumps([socket.gethostname(), dict(facts or {})]))
    if placement.rank == 0:
        came = _wait_for_all(store, placement, rendezvous_seconds)
        check_alike(came, nodes)
    if placement.world_size > placement.local_world_size:
        _choose_interface(store, placement)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def check_alike(came: Sequence[tuple[str, Mapping[str, str]]], nodes: int | None) -> None:
    """Args: came: the host and the facts of each rank. Raises UserError: see meet."""
    host, facts = came[0]
    for rank, (other, others) in enumerate(came):
        for name, value in facts.items():
            if others.get(name) != value:
                raise UserError(
                    f"rank {rank} on {other} has {name} {others.get(name)}, rank 0 on {host} has {value}: "
                    "all hosts need the same"
                )
    hosts = list(dict.fromkeys(name for name, _ in came))
    if nodes is not None and len(hosts) != nodes:
        raise UserError(
            f"launch.nodes: {nodes} are asked for, the ranks are on {len(hosts)} ({', '.join(hosts[:8])}); a runner "
            "that does not find its hostfile starts them on its own host"
        )


def join_rank_zero(
    store: dist.Store,
    placement: Placement,
    me: Member,
    stop: StopRequest,
    announce: Callable[[Outcome], None],
    **settings: Any,
) -> WatchdogClient:
    """Join the watchdog that rank 0 runs. Collective. Args: announce: what rank 0 does with the outcome."""
    watchdog = None
    if placement.rank == 0:
        host = placement.master_addr if placement.world_size > placement.local_world_size else "127.0.0.1"
        watchdog = Watchdog(announce, settings["silence_seconds"], host)
        store.set("watchdog", str(watchdog.address))
    address = Address.parse(store.get("watchdog").decode())
    return WatchdogClient(address, me, placement.world_size, stop, watcher="rank 0", watchdog=watchdog, **settings)


def _wait_for_all(store: dist.Store, placement: Placement, seconds: float) -> list[tuple[str, dict[str, str]]]:
    """Before the group is started, whose own error names nobody."""
    keys = [f"came/{rank}" for rank in range(placement.world_size)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        there = [json.loads(store.get(key))[0] for rank, key in enumerate(keys) if rank not in missing]
        raise UserError(
            f"rank {', '.join(map(str, missing))} of {placement.world_size} did not come within {seconds:g} s "
            f"(launch.rendezvous_seconds); those on {', '.join(dict.fromkeys(there))} are there"
        ) from None
    return [json.loads(value) for value in store.multi_get(keys)]


def _choose_device(placement: Placement) -> torch.device | None:
    """This rank's accelerator, made the current one before the process group is bound to it."""
    if not torch.accelerator.is_available():
        return None
    count = torch.accelerator.device_count()
    index = placement.local_rank
    if count == 1 and placement.local_world_size > 1 and "SLURM_STEP_ID" in os.environ:
        # Slurm may show each rank its own device only, under the number 0. Accelerate looks at this variable.
        index = 0
        os.environ["LOCAL_RANK"] = "0"
    elif placement.local_world_size > count:
        raise UserError(
            f"launch.processes_per_node: {placement.local_world_size} ranks on {socket.gethostname()}, which has "
            f"{count} accelerators; start at most {count} there, or set training.use_cpu=true"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def _choose_interface(store: dist.Store, placement: Placement) -> None:
    """gloo binds to the address of this host's name. Where that is a loopback address (Debian's 127.0.1.1), the others
    would look for this rank on themselves.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"
    if not own.startswith("127."):
        return
    # From rank 0's own host the way to rank 0 is a loop; a rank so many further on is on another.
    elsewhere = (placement.rank + placement.local_world_size) % placement.world_size
    for host in (placement.master_addr, json.loads(store.get(f"came/{elsewhere}"))[0]):
        address = address_towards(host)
        if address and not address.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(host)
            return
