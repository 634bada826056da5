"""The rendezvous of the ranks: torch's process group, and the watchdog that rank 0 runs if the launcher does not.

It happens before the imports and before the data and the model are loaded, which takes minutes, so that the watchdog
also notices a rank that dies during that time.
"""

import contextlib
import errno
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_zero.errors import UserError, first_line, printable_line
from sparse_zero.ranks import private_files
from sparse_zero.ranks.extension_locks import remove_abandoned_locks
from sparse_zero.ranks.failures import Outcome, RankInfo
from sparse_zero.ranks.network import LOOPBACK, address_towards, interface_towards
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.stop_signals import StopRequest
from sparse_zero.ranks.watchdog import Address, Watchdog
from sparse_zero.ranks.watchdog_client import WatchdogClient

SECRET_VARIABLE = "SPARSE_ZERO_SECRET"
"""The environment variable with which a user who starts ranks by hand gives them a secret. None is needed if the hosts
share the output directory."""


def open_store(placement: Placement, rendezvous_seconds: float = 300) -> dist.Store:
    """Open the key-value store for the rendezvous, which rank 0 or torchrun's agent serves.

    The store has no authentication. If all ranks are on one host, rank 0 listens on the loopback interface only.

    Raises:
        UserError: rank 0's port is in use, or rank 0 cannot be reached.
    """
    # torchrun's agent already serves a store, and serves the same one after a restart.
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = placement.rank == 0 and not has_agent
    on_loopback = placement.is_on_one_host and not has_agent
    try:
        store = dist.TCPStore(
            LOOPBACK if on_loopback else placement.master_addr,
            placement.master_port,
            is_master=is_server,
            timeout=timedelta(seconds=rendezvous_seconds),
            wait_for_workers=False,
            master_listen_fd=_listen_on_loopback(placement.master_port) if is_server and on_loopback else None,
        )
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
            raise UserError(
                f"the rendezvous port {placement.master_port} on {socket.gethostname()} is in use by another program; "
                "set launch.master_port (or MASTER_PORT) to another port, or launch.master_port to auto"
            ) from None
        raise UserError(
            f"rank {placement.rank} on {socket.gethostname()} cannot reach rank 0 at "
            f"{placement.master_addr}:{placement.master_port} within {rendezvous_seconds:g} s: "
            f"{first_line(error)}"
        ) from None
    return dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def init_process_group(
    store: dist.Store,
    placement: Placement,
    use_cpu: bool,
    backend: str | None = None,
    must_match: Mapping[str, str] | None = None,
    nodes: int | None = None,
    rendezvous_seconds: float = 300,
    timeout_seconds: float = 1800,
) -> None:
    """Wait for all ranks, check that they match, and initialize torch's default process group. Collective.

    Args:
        use_cpu: do not use accelerators.
        backend: the backend of the process group; None: the default for this machine's accelerator, or gloo.
        must_match: values that must be the same on all ranks, such as versions, by name.
        nodes: the number of hosts that the ranks must be on; None: any number.
        rendezvous_seconds: how long rank 0 waits for the other ranks.
        timeout_seconds: timeout of the process group's collectives.

    Raises:
        UserError: a rank did not join, has other values than rank 0, or the ranks are not on `nodes` hosts.
    """
    device = None if use_cpu else _choose_device(placement)
    if backend is None:
        backend = "gloo" if device is None else dist.get_default_backend_for_device(device)
    remove_abandoned_locks()
    store.set(f"joined/{placement.rank}", json.dumps([socket.gethostname(), dict(must_match or {})]))
    if placement.rank == 0:
        check_ranks_match(_wait_for_all(store, placement, rendezvous_seconds), nodes)
    if placement.is_on_one_host:
        _use_loopback()
    else:
        _choose_interface(store, placement)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def check_ranks_match(joined: Sequence[tuple[str, Mapping[str, str]]], nodes: int | None) -> None:
    """Check that all ranks have the values of rank 0, and that they are on the right number of hosts.

    Args:
        joined: host and values (`must_match`) of each rank.
        nodes: the number of hosts that the ranks must be on; None: any number.

    Raises:
        UserError: a rank has other values than rank 0, or the ranks are not on `nodes` hosts.
    """
    host, values = joined[0]
    for rank, (other_host, other_values) in enumerate(joined):
        for name, value in values.items():
            if other_values.get(name) != value:
                raise UserError(
                    f"rank {rank} on {other_host} has {name} {other_values.get(name)}, rank 0 on {host} has {value}: "
                    "it must be the same on all hosts"
                )
    hosts = list(dict.fromkeys(name for name, _ in joined))
    if nodes is not None and len(hosts) != nodes:
        raise UserError(
            f"launch.nodes is {nodes}, but the ranks are on {len(hosts)} host{'s' if len(hosts) > 1 else ''} "
            f"({', '.join(hosts[:8])}); a runner that does not find its hostfile starts all ranks on its own host"
        )


def join_rank_zero_watchdog(
    store: dist.Store,
    placement: Placement,
    info: RankInfo,
    stop: StopRequest,
    on_outcome: Callable[[Outcome], None],
    directory: Path,
    **settings: Any,
) -> WatchdogClient:
    """Start the watchdog on rank 0, and connect every rank to it. Collective.

    The store, which everyone on the network can read, holds the watchdog's port only. The secret is the value of
    SPARSE_ZERO_SECRET if the ranks have been given one, else it is in a file that rank 0 removes when all have joined.

    Args:
        info: this rank, as it introduces itself.
        stop: receives the watchdog's request to stop.
        on_outcome: called on rank 0 with the outcome, if the watchdog ends the run.
        directory: where the file is; all hosts share it.
        settings: further arguments of WatchdogClient.

    Raises:
        UserError: rank 0 cannot write the file, or this rank cannot read it.
    """
    watchdog = None
    token = os.environ.pop(SECRET_VARIABLE, None)
    if placement.rank == 0:
        host = LOOPBACK if placement.is_on_one_host else placement.master_addr
        watchdog = Watchdog(on_outcome, settings["silence_seconds"], host, token)
        file = private_files.own_file(directory, "watchdog")
        if token is None:
            private_files.write(file, watchdog.address.token)
            watchdog.on_last_join = functools.partial(private_files.remove, file)
        store.set("watchdog", json.dumps([watchdog.address.host, watchdog.address.port, file.name]))
    host, port, name = json.loads(store.get("watchdog"))
    address = Address(str(host), int(port), token or _read_secret(directory, str(name)))
    return WatchdogClient(address, info, placement.world_size, stop, owner="rank 0", watchdog=watchdog, **settings)


def _read_secret(directory: Path, name: str, seconds: float = 10) -> str:
    """Args: name: of the file, from the store, where a stranger may have put another; seconds: for a shared disk to
    show it.
    """
    if not re.fullmatch(r"watchdog\.[\w.-]+", name):
        raise UserError(f"the rendezvous store names the file {printable_line(name)!r}: someone else writes to it")
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            return (directory / name).read_text()
        if time.monotonic() > deadline:
            raise UserError(
                f"{socket.gethostname()} cannot read {directory.absolute() / name}, which rank 0 has written: "
                "training.output_dir must be on a disk that all hosts share; or give all ranks the same random text "
                f"in the variable {SECRET_VARIABLE}"
            )
        time.sleep(0.2)


def _listen_on_loopback(port: int) -> int:
    """The descriptor of a listening socket, which torch's store closes. Raises OSError: the port is in use."""
    return socket.create_server((LOOPBACK, port), backlog=4096).detach()


def _wait_for_all(store: dist.Store, placement: Placement, seconds: float) -> list[tuple[str, dict[str, str]]]:
    """Wait here, because the error of the process group's own rendezvous does not name the missing ranks."""
    keys = [f"joined/{rank}" for rank in range(placement.world_size)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        hosts = dict.fromkeys(_entry(store.get(key))[0] for rank, key in enumerate(keys) if rank not in missing)
        raise UserError(
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {placement.world_size} did not "
            f"join within {seconds:g} s (launch.rendezvous_seconds); joined: ranks on {', '.join(hosts)}"
        ) from None
    return [_entry(value) for value in store.multi_get(keys)]


def _entry(value: bytes | str) -> tuple[str, dict[str, str]]:
    """A rank's host and its values (`must_match`), as it wrote them into the store."""
    host, values = json.loads(value)
    return printable_line(str(host)), {str(name): printable_line(str(each)) for name, each in values.items()}


def _choose_device(placement: Placement) -> torch.device | None:
    """Make this rank's accelerator the current one, before the process group is bound to it, and return it."""
    if not torch.accelerator.is_available():
        return None
    count = torch.accelerator.device_count()
    index = placement.local_rank
    if count == 1 and placement.local_world_size > 1 and "SLURM_STEP_ID" in os.environ:
        # Slurm may make only its own device visible to each rank, as number 0. Accelerate reads LOCAL_RANK.
        index = 0
        os.environ["LOCAL_RANK"] = "0"
    elif placement.local_world_size > count:
        raise UserError(
            f"launch.processes_per_node: {placement.local_world_size} ranks on {socket.gethostname()}, which has "
            f"{count} accelerators; start at most {count} there, or set training.use_cpu=true"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def _use_loopback() -> None:
    """Make gloo, which has no authentication, listen on the loopback interface only, unless the user chose another."""
    loopback = interface_towards(LOOPBACK)
    if loopback and not os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ["GLOO_SOCKET_IFNAME"] = loopback


def _choose_interface(store: dist.Store, placement: Placement) -> None:
    """Set GLOO_SOCKET_IFNAME if this host's name resolves to a loopback address (127.0.1.1 on Debian).

    gloo binds to the address of this host's name. The other hosts would try to reach this rank on themselves.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"
    if not own.startswith("127."):
        return
    # On rank 0's own host the route to rank 0 is a loop. The rank with this offset is on another host.
    elsewhere = (placement.rank + placement.local_world_size) % placement.world_size
    for host in (placement.master_addr, _entry(store.get(f"joined/{elsewhere}"))[0]):
        address = address_towards(host)
        if address and not address.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(host)
            return
