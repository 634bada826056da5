"""The report of one host about itself: one line of JSON on stdout, after MARK.

    python -m launcher.doctor.host_report '{"torch": true, "output": "runs/demo"}'

`sparse-zero doctor` runs this module on every host of a run, with ssh or srun, and checks the reports. This module
only collects facts. It imports torch only if the request has `torch`. A fact that is not available is null.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.doctor import input_sources
from launcher.ways import devices
from sparse_zero.ranks import extension_locks
from sparse_zero.ranks.network import interface_towards, interfaces

MARK = "sparse-zero-host: "
PACKAGES = ("sparse-zero", "torch", "deepspeed", "transformers", "accelerate", "datasets")
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("HF_HUB_OFFLINE", "PDSH_RCMD_TYPE", "SLURM_JOB_ID", "SLURMD_NODENAME"),
)
CODE = ("sparse_zero", "rpn")
"""The packages whose source code must be the same on all hosts."""

Report = dict[str, Any]


def build_report(request: dict[str, Any]) -> Report:
    """Collect the facts about this host.

    Args: request: any of
        `torch`: true to import torch and list the devices;
        `port`: a TCP port to test;
        `peers`: names of other hosts to resolve;
        `files`: paths, of which the report has checksums;
        `sources`: see launcher.doctor.input_sources;
        `output`: a directory to which the run will write;
        `marker`: a file that another host wrote.

    Returns: facts by name. Names that end in `_bytes` are in bytes. `clock` is when this call began and ended, in
        seconds since the epoch.
    """
    started = time.time()
    facts: Report = {
        "host": socket.gethostname(),
        "cores": devices.usable_cores(),
        "versions": versions(),
        "code": code_checksum(Path(__file__).parents[2]),
        "tools": {name: shutil.which(name) for name in ("g++", "ninja")},
        "operators": sorted({each.name for each in extension_locks.extension_directories() if any(each.glob("*.so"))}),
        "device_nodes": [
            str(node) for pattern in devices.DEVICE_NODES for node in sorted(Path("/dev").glob(pattern))[:64]
        ],
        "driver": driver_version(),
        "network": network(request.get("peers", ())),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "shared_memory_bytes": _free_bytes(Path("/dev/shm")),
        "port_is_free": devices.port_is_free(request["port"]) if request.get("port") else None,
        "files": {path: input_sources.checksum(Path(path)) for path in request.get("files", ())},
        "sources": input_sources.inspect_sources(request.get("sources", {})),
        "output": output(Path(request["output"])) if request.get("output") else None,
        "marker_is_seen": Path(request["marker"]).is_file() if request.get("marker") else None,
        "torch": torch_facts() if request.get("torch") else None,
    }
    return {**facts, "clock": [started, time.time()]}


def versions() -> dict[str, str | None]:
    """The versions of Python and of PACKAGES. None: the package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def code_checksum(root: Path) -> str:
    """A checksum of the source code of CODE: two checkouts may have the same version number.

    Args: root: the directory that contains the packages.
    """
    digest = hashlib.sha256()
    for package in CODE:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def driver_version() -> str | None:
    """Name and version of the accelerators' kernel module, as in `nvidia 580.65`."""
    for module in ("nvidia", "amdgpu"):
        with contextlib.suppress(OSError):
            return f"{module} {Path('/sys/module', module, 'version').read_text().strip()}"
    return None


def torch_facts() -> dict[str, Any]:
    """Devices and backends that torch finds, or `problem` if it cannot be imported."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as problem:  # a missing system library raises OSError, a broken build any exception
        return {"problem": f"{type(problem).__name__}: {problem}".splitlines()[0]}
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cuda = kind is not None and kind.type == "cuda"
    count = torch.accelerator.device_count() if kind else 0
    properties = [torch.cuda.get_device_properties(number) for number in range(count)] if cuda else []
    nccl = cuda and dist.is_available() and dist.is_nccl_available()
    return {
        "kind": kind.type if kind else None,
        "devices": [{"name": each.name, "memory_bytes": each.total_memory} for each in properties]
        or [{"name": str(kind), "memory_bytes": None}] * count,
        # On the CPU bfloat16 always works, but it may be slow.
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if cuda else None,
        "built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "gloo": dist.is_available() and dist.is_gloo_available(),
    }


def network(peers: Sequence[str]) -> dict[str, Any]:
    """This host's name resolution and interfaces, and its route to each of `peers`."""
    return {
        "name_resolves_to": addresses_of(socket.gethostname()),
        # gloo uses the first of these addresses that it can bind, or else the loopback interface.
        "gloo_address": next(filter(_is_own, addresses_of(socket.gethostname())), None),
        "interfaces": interfaces(),
        "routes": {peer: _route(peer) for peer in peers},
    }


def addresses_of(name: str) -> list[str]:
    """The addresses to which a host name resolves, in the resolver's order; empty if it does not resolve."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _route(peer: str) -> dict[str, str | None]:
    """The peer's address, and the interface through which this host reaches it."""
    address = next((each for each in addresses_of(peer) if ":" not in each), None)
    return {"address": address, "interface": interface_towards(address) if address else None}


def output(directory: Path) -> dict[str, Any]:
    """Free space and permissions at `directory`, or at its nearest parent that exists."""
    existing = input_sources.nearest_existing(directory)
    return {
        "existing": str(existing),
        "is_directory": existing.is_dir(),
        "is_writable": os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": _free_bytes(existing),
    }


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


if __name__ == "__main__":
    print(MARK + json.dumps(build_report(json.loads(sys.argv[1]))), flush=True)
