"""What is wrong with one host, by its own report: pure functions of launcher.doctor.host_report.report's answers."""

import ipaddress
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.doctor.host_report import Report
from launcher.report import readable
from sparse_zero.recipe.recipe import Recipe

SHARED_MEMORY_PER_RANK = 2**27
"""Bytes of /dev/shm: NCCL's and DeepSpeed's buffers and the batches of data workers go through it. A container's
default, 64 MiB for all, is too little for two ranks."""
LEAST_DISK = 2**30
CHECKPOINT_BYTES_PER_SCALAR = 12.06
"""Value and two moments in float32, and headers: the larger of the README's two measured figures."""


@dataclass(frozen=True)
class Wanted:
    """What a run wants of a host."""

    recipe: Recipe | None = None
    """None: nothing in particular."""
    ranks: int | None = None
    """On this host. None: one for each accelerator, and one where there is none."""
    has_ranks: bool = True
    """False of a machine that only gives the run to a scheduler."""
    several_hosts: bool = False
    master: str | None = None
    """Where the ranks of other hosts look for rank 0."""

    @property
    def training(self) -> dict[str, Any]:
        return self.recipe.training if self.recipe else {}

    @property
    def uses_cpu(self) -> bool:
        return bool(self.training.get("use_cpu"))


def check_host(report: Report, wanted: Wanted, host: str | None = None) -> list[Finding]:
    """All that can be said of a host by itself."""
    checks = [versions, inputs, disk]
    if wanted.has_ranks:
        checks[1:1] = [operators, accelerators, backends, network, shared_memory, port, visible_devices]
    return [finding for check in checks for finding in check(report, wanted, host)]


def accelerator_count(report: Report, wanted: Wanted) -> int:
    """The devices that ranks can use."""
    return 0 if wanted.uses_cpu else len((report["torch"] or {}).get("devices", ()))


def rank_count(report: Report, wanted: Wanted) -> int:
    return wanted.ranks or max(1, accelerator_count(report, wanted))


def versions(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """Packages, and what this package says it needs of them."""
    found, minima = report["versions"], _minima()
    bad = False
    for name, version in found.items():
        if version is None:
            bad = True
            yield error("versions", f"{name} is not installed", f"{sys.executable} -m pip install {name}", host)
        elif name in minima and not minima[name].contains(version, prereleases=True):
            bad = True
            needed = f"{name} is {version}, sparse-zero needs {minima[name]}"
            cure = (
                "use another Python" if name == "python" else f"{sys.executable} -m pip install '{name}{minima[name]}'"
            )
            yield error("versions", needed, cure, host)
    if report["torch"] and "problem" in report["torch"]:
        bad = True
        yield error("versions", f"torch cannot be imported: {report['torch']['problem']}", "install it anew", host)
    if not bad:
        yield ok("versions", ", ".join(f"{name} {version}" for name, version in found.items()), host)


def _minima() -> dict[str, Any]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        needed = [Requirement(line) for line in metadata.requires("sparse-zero") or ()]
        python = metadata.metadata("sparse-zero").get("Requires-Python")
    except metadata.PackageNotFoundError:
        return {}
    minima = {each.name: each.specifier for each in needed if each.specifier and each.marker is None}
    return {**minima, "python": SpecifierSet(python)} if python else minima


def operators(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """What DeepSpeed needs to build its own C++: it asks for ninja even when that was done before."""
    missing = [name for name, path in report["tools"].items() if path is None]
    needed = [] if accelerator_count(report, wanted) else ["deepspeed_shm_comm"]
    needed += ["cpu_adam"] if "offload" in str(wanted.training.get("deepspeed", "")) else []
    unbuilt = sorted(set(needed) - set(report["operators"]))
    if not missing:
        first = f"; the first run builds {' and '.join(unbuilt)}, in a minute" if unbuilt else ""
        yield ok("operators", f"g++ and ninja are there{first}", host)
        return
    remedies = {
        "g++": "install a C++ compiler (apt-get install g++, or module load gcc in launch.prologue)",
        "ninja": f"install ninja-build, or put {Path(sys.executable).parent} into PATH by launch.prologue",
    }
    fatal = ("ninja" in missing and needed) or unbuilt
    say = error if fatal else warning
    why = f"DeepSpeed cannot load {' and '.join(needed)}" if fatal else "DeepSpeed could not build an operator"
    yield say(
        "operators", f"no {' and no '.join(missing)}: {why}", "; ".join(remedies[name] for name in missing), host
    )


def accelerators(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """Devices: enough for the ranks, and able to do what the recipe asks."""
    torch = report["torch"]
    if torch is None or "problem" in torch:
        return
    ranks, devices = rank_count(report, wanted), torch["devices"]
    if wanted.uses_cpu or not devices:
        real = [node for node in report["device_nodes"] if re.search("nvidia|kfd|davinci", node)]
        if real and not wanted.uses_cpu:
            yield warning(
                "accelerator",
                f"there is {real[0]}, but torch (built for {torch['built_for']}) sees no device",
                "see that the driver is loaded, CUDA_VISIBLE_DEVICES not empty, and torch built for this device",
                host,
            )
        shared = f"{ranks} rank{'s share' if ranks > 1 else ' takes'} {report['cores']} CPU cores"
        if ranks > report["cores"]:
            fewer = f"start {report['cores']} or fewer on this host (slots, launch.processes_per_node)"
            yield warning("accelerator", shared, fewer, host)
        else:
            yield ok("accelerator", f"{'not used' if devices else 'none'}: {shared}", host)
        return
    if ranks > len(devices):
        fewer = f"give it slots={len(devices)} (without a hostfile: launch.processes_per_node), or train with use_cpu"
        yield error("accelerator", f"{ranks} ranks, but {len(devices)} accelerators", fewer, host)
    if wanted.training.get("bf16") and torch["bf16"] is False:
        cure = "set training.bf16=false, and training.fp16=true or model.dtype=float32"
        yield error("accelerator", f"{devices[0]['name']} has no bfloat16, which training.bf16 asks for", cure, host)
    if ranks <= len(devices):
        memory = devices[0]["memory_bytes"]
        facts = [readable("bytes", memory)] if memory else []
        facts += [report["driver"]] if report["driver"] else []
        facts += ["bfloat16"] if torch["bf16"] else []
        used = f"{len(devices)} x {devices[0]['name']}"
        yield ok("accelerator", f"{used} ({', '.join(facts)})" if facts else used, host)


def backends(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """What the ranks would talk over."""
    torch = report["torch"]
    if torch is None or "problem" in torch:
        return
    if not torch["gloo"]:
        yield error("backend", "torch was built without gloo", "install a usual build of torch", host)
    elif torch["kind"] == "cuda" and not wanted.uses_cpu:
        if torch["nccl"]:
            yield ok("backend", f"NCCL {torch['nccl']}, gloo", host)
        else:
            yield error("backend", "torch was built without NCCL", "install a usual CUDA build of torch", host)
    else:
        yield ok("backend", "gloo", host)


def network(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """Whether the other hosts' ranks can reach this one's."""
    net, variables = report["network"], report["variables"]
    if not wanted.several_hosts:
        return
    chosen = variables.get("GLOO_SOCKET_IFNAME")
    takes = _interface_of(net["gloo_address"], net)
    if chosen:
        unknown = [name for name in chosen.split(",") if name not in net["interfaces"]]
        if unknown:
            there = f"choose one of {', '.join(_outward(net))} in launch.environment"
            yield error("network", f"GLOO_SOCKET_IFNAME: there is no interface {', '.join(unknown)}", there, host)
        else:
            yield ok("network", f"gloo takes {chosen}, by GLOO_SOCKET_IFNAME", host)
    elif net["gloo_address"] is None or ipaddress.ip_address(net["gloo_address"]).is_loopback:
        name, resolved = report["host"], ", ".join(net["name_resolves_to"])
        why = f"its name {name} resolves to {resolved}" if resolved else f"its name {name} does not resolve"
        ways = {
            peer: route["interface"] for peer, route in net["routes"].items() if route["interface"] in _outward(net)
        }
        if ways:
            # As sparse_zero.ranks.rendezvous does.
            peer, way = next(iter(ways.items()))
            yield ok("network", f"{why}: the ranks take {way}, which leads to {peer}", host)
        else:
            cure = f"launch.environment.GLOO_SOCKET_IFNAME={_best_interface(net)}, or correct {name} in its /etc/hosts"
            yield error("network", f"{why}: gloo would give the other hosts a loopback address", cure, host)
    else:
        yield ok("network", f"gloo takes {takes} ({net['gloo_address']})", host)
    yield from _nccl_interface(report, wanted, host)
    route = net["routes"].get(wanted.master)
    if route and route["address"] is None:
        cure = "add it to its /etc/hosts or the DNS, or give an address as launch.master_addr"
        yield error("network", f"does not know rank 0's host, {wanted.master}", cure, host)
    elif route and ipaddress.ip_address(route["address"]).is_loopback and host != wanted.master:
        cure = "correct its /etc/hosts, or give an address as launch.master_addr"
        yield error("network", f"takes {wanted.master}, rank 0's host, for itself ({route['address']})", cure, host)


def _nccl_interface(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    chosen = report["variables"].get("NCCL_SOCKET_IFNAME", "")
    if not chosen or chosen.startswith("^") or not accelerator_count(report, wanted):
        return
    # NCCL takes names as beginnings, but for those after a =.
    exact, names = chosen.startswith("="), chosen.removeprefix("=").split(",")
    known = report["network"]["interfaces"]
    if not any(own == name or (not exact and own.startswith(name)) for name in names for own in known):
        cure = f"choose one of {', '.join(_outward(report['network']))} in launch.environment"
        yield error("network", f"NCCL_SOCKET_IFNAME={chosen} fits no interface", cure, host)


def _interface_of(address: str | None, net: dict[str, Any]) -> str | None:
    return next((name for name, own in net["interfaces"].items() if address in own), None)


def _outward(net: dict[str, Any]) -> list[str]:
    """Interfaces with an address that others can reach."""
    loopback = {name: [ipaddress.ip_address(a).is_loopback for a in own] for name, own in net["interfaces"].items()}
    return [name for name, own in loopback.items() if own and not all(own)]


def _best_interface(net: dict[str, Any]) -> str:
    """The first that leads anywhere."""
    return next(iter(_outward(net)), "INTERFACE")


def shared_memory(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """Room in /dev/shm."""
    free, ranks = report["shared_memory_bytes"], rank_count(report, wanted)
    if free is None:
        return
    if ranks > 1 and free < ranks * SHARED_MEMORY_PER_RANK:
        cure = "docker run --shm-size=8g (or --ipc=host); on a host: mount -o remount,size=8g /dev/shm"
        shown = readable("bytes", ranks * SHARED_MEMORY_PER_RANK)
        few = f"/dev/shm has {readable('bytes', free)} free, {ranks} ranks may need {shown}"
        yield warning("shared memory", few, cure, host)
    else:
        yield ok("shared memory", f"{readable('bytes', free)} free", host)


def port(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """launch.master_port, on the host that was asked for it."""
    number = wanted.recipe.launch.master_port if wanted.recipe else "auto"
    if report["port_is_free"] is None:
        return
    if report["port_is_free"]:
        yield ok("port", f"{number} is free", host)
    else:
        yield error("port", f"launch.master_port: {number} is in use", "choose another, or auto", host)


def inputs(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """The recipe's files, its model and its data."""
    for path, checksum in report["files"].items():
        if checksum is None:
            yield error("files", f"{path} is not there", "put it there, or start from a shared directory", host)
    for key, source in report["sources"].items():
        if source["problem"]:
            reason = source["problem"] if source["place"] == "package" else f"{source['path']}: {source['problem']}"
            yield error("files", f"{key}: {reason}", "put it there, or on a disk that all hosts share", host)
        elif source["place"] == "hub" and not source["cached"]:
            load = f"hf download {'--repo-type dataset ' if key == 'data.path' else ''}{source['path']}"
            if source["offline"]:
                cure = f"run there, online: {load}; or let HF_HOME name a cache that has it"
                yield error("files", f"{key}: {source['path']} is not in the cache, HF_HUB_OFFLINE is set", cure, host)
            else:
                cure = f"load it beforehand: {load}; it must be a name that the hub knows"
                yield warning("files", f"{key}: {source['path']} is not in the cache yet", cure, host)
        else:
            where = {"hub": "in the cache"}.get(source["place"], "there")
            yield ok("files", f"{key}: {source['name']} is {where}", host)


def disk(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """Room for checkpoints."""
    place = report["output"]
    if place is None:
        return
    directory = wanted.training.get("output_dir")
    if not place["is_directory"]:
        yield error("disk", f"training.output_dir: {place['existing']} is a file", "give another directory", host)
        return
    if not place["is_writable"]:
        cure = "give another directory, or the right to write"
        yield error("disk", f"training.output_dir: {place['existing']} cannot be written to", cure, host)
        return
    free, takes = place["free_bytes"], checkpoint_bytes(report, wanted)
    if free is None:
        return
    kept = (wanted.training.get("save_total_limit") or 1) + 1
    room = f"{readable('bytes', free)} free for {directory}"
    size = f"; a checkpoint takes about {readable('bytes', takes)}" if takes else ""
    if takes and free < kept * takes:
        cure = "make room, or set training.save_total_limit"
        yield error("disk", f"{room}{size}, {kept} must fit", cure, host)
    elif free < LEAST_DISK:
        yield warning("disk", f"{room}{size}", "make room", host)
    else:
        yield ok("disk", f"{room}{size}", host)


def checkpoint_bytes(report: Report, wanted: Wanted) -> int | None:
    """Of one checkpoint of all ranks; None where that would take more than a model's headers to know."""
    scalars = report["sources"].get("model.name", {}).get("scalars")
    if not (wanted.recipe and scalars) or wanted.training.get("save_strategy") == "no":
        return None
    density = wanted.recipe.sparse.model_density
    return None if density is None else round(CHECKPOINT_BYTES_PER_SCALAR * density * scalars)


def visible_devices(report: Report, wanted: Wanted, host: str | None) -> Iterator[Finding]:
    """CUDA_VISIBLE_DEVICES, set by hand."""
    value = report["variables"].get("CUDA_VISIBLE_DEVICES")
    if value is None or wanted.uses_cpu or not report["device_nodes"] or "SLURM_JOB_ID" in report["variables"]:
        return
    choose = "unset it, and choose by the hostfile's slots and launch.include" if wanted.several_hosts else "unset it"
    if not value.strip():
        yield warning("surroundings", "CUDA_VISIBLE_DEVICES is empty and hides every GPU", choose, host)
    elif (wanted.recipe is None or wanted.recipe.launch.launcher == "deepspeed") and re.search("[A-Za-z]", value):
        cure = "give numbers, or launch.launcher=torchrun"
        yield error("surroundings", f"CUDA_VISIBLE_DEVICES={value}: DeepSpeed's runner takes numbers only", cure, host)
    else:
        yield warning("surroundings", f"CUDA_VISIBLE_DEVICES={value}: the run sees no other GPU", choose, host)
