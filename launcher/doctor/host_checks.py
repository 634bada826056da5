"""Checks of one host: pure functions of its report (launcher.doctor.host_report)."""

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

SHARED_MEMORY_PER_RANK_BYTES = 2**27
"""Of /dev/shm, through which NCCL's and DeepSpeed's buffers and the batches of data workers pass. The default of a
container, 64 MiB in total, is too little for two ranks."""
MIN_DISK_BYTES = 2**30
CHECKPOINT_BYTES_PER_SCALAR = 12.06
"""A value and two moments in float32, and headers: measured on 8 ranks with benchmarks/checkpoint.py."""


@dataclass(frozen=True)
class HostRequirements:
    """What a run needs on one host."""

    recipe: Recipe | None = None
    """None: no particular run."""
    ranks: int | None = None
    """Ranks on this host. None: one for each accelerator, or one if there is none."""
    has_ranks: bool = True
    """False for a machine that only submits the run to a scheduler."""
    several_hosts: bool = False
    master: str | None = None
    """The name or address at which the ranks of other hosts connect to rank 0."""

    @property
    def training(self) -> dict[str, Any]:
        return self.recipe.training if self.recipe else {}

    @property
    def uses_cpu(self) -> bool:
        return bool(self.training.get("use_cpu"))


def check_host(report: Report, required: HostRequirements, host: str | None = None) -> list[Finding]:
    """Run all checks of a single host.

    Args:
        report: of this host.
        required: what the run needs.
        host: its name in the findings.
    """
    checks = [versions, inputs, disk]
    if required.has_ranks:
        checks[1:1] = [operators, accelerators, backends, network, shared_memory, port, visible_devices]
    return [finding for check in checks for finding in check(report, required, host)]


def accelerator_count(report: Report, required: HostRequirements) -> int:
    """The number of accelerators that ranks can use."""
    return 0 if required.uses_cpu else len((report["torch"] or {}).get("devices", ()))


def rank_count(report: Report, required: HostRequirements) -> int:
    """The number of ranks on this host."""
    return required.ranks or max(1, accelerator_count(report, required))


def versions(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks the installed packages against the requirements of sparse-zero."""
    found, needed = report["versions"], _required_versions()
    is_wrong = False
    for name, version in found.items():
        if version is None:
            is_wrong = True
            yield error("versions", f"{name} is not installed", f"{sys.executable} -m pip install {name}", host)
        elif name in needed and not needed[name].contains(version, prereleases=True):
            is_wrong = True
            message = f"{name} is {version}, sparse-zero needs {needed[name]}"
            install = f"{sys.executable} -m pip install '{name}{needed[name]}'"
            yield error("versions", message, "use another Python" if name == "python" else install, host)
    if report["torch"] and "problem" in report["torch"]:
        is_wrong = True
        yield error("versions", f"torch cannot be imported: {report['torch']['problem']}", "reinstall torch", host)
    if not is_wrong:
        yield ok("versions", ", ".join(f"{name} {version}" for name, version in found.items()), host)


def _required_versions() -> dict[str, Any]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        requirements = [Requirement(line) for line in metadata.requires("sparse-zero") or ()]
        python = metadata.metadata("sparse-zero").get("Requires-Python")
    except metadata.PackageNotFoundError:
        return {}
    versions = {each.name: each.specifier for each in requirements if each.specifier and each.marker is None}
    return {**versions, "python": SpecifierSet(python)} if python else versions


def operators(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks the tools with which DeepSpeed builds its C++ operators. It needs ninja also to load an operator that is
    already built.
    """
    missing = [name for name, path in report["tools"].items() if path is None]
    needed = [] if accelerator_count(report, required) else ["deepspeed_shm_comm"]
    needed += ["cpu_adam"] if "offload" in str(required.training.get("deepspeed", "")) else []
    unbuilt = sorted(set(needed) - set(report["operators"]))
    if not missing:
        first = f"; the first run builds {' and '.join(unbuilt)}, which takes a minute" if unbuilt else ""
        yield ok("operators", f"g++ and ninja are installed{first}", host)
        return
    remedies = {
        "g++": "install a C++ compiler (apt-get install g++, or module load gcc in launch.prologue)",
        "ninja": f"install ninja-build, or add {Path(sys.executable).parent} to PATH in launch.prologue",
    }
    is_fatal = ("ninja" in missing and needed) or unbuilt
    report_as = error if is_fatal else warning
    why = f"DeepSpeed cannot load {' and '.join(needed)}" if is_fatal else "DeepSpeed could not build an operator"
    message = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: {why}"
    yield report_as("operators", message, "; ".join(remedies[name] for name in missing), host)


def accelerators(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks that there are enough accelerators for the ranks, and that they support the recipe's settings."""
    torch = report["torch"]
    if torch is None or "problem" in torch:
        return
    ranks, devices = rank_count(report, required), torch["devices"]
    if required.uses_cpu or not devices:
        real = [node for node in report["device_nodes"] if re.search("nvidia|kfd|davinci", node)]
        if real and not required.uses_cpu:
            yield warning(
                "accelerator",
                f"{real[0]} exists, but torch (built for {torch['built_for']}) finds no device",
                "check that the driver is loaded, CUDA_VISIBLE_DEVICES not empty, and torch built for this device",
                host,
            )
        shared = f"{ranks} rank{'s share' if ranks > 1 else ' uses'} {report['cores']} CPU cores"
        if ranks > report["cores"]:
            fewer = f"start {report['cores']} or fewer on that host (slots, launch.processes_per_node)"
            yield warning("accelerator", shared, fewer, host)
        else:
            yield ok("accelerator", f"{'not used' if devices else 'none'}: {shared}", host)
        return
    if ranks > len(devices):
        fewer = (
            f"set slots={len(devices)} in the hostfile (without a hostfile: launch.processes_per_node), or train on "
            "the CPU (training.use_cpu=true)"
        )
        yield error("accelerator", f"{ranks} ranks, but {len(devices)} accelerators", fewer, host)
    if required.training.get("bf16") and torch["bf16"] is False:
        remedy = "set training.bf16=false, and training.fp16=true or model.dtype=float32"
        yield error("accelerator", f"training.bf16: {devices[0]['name']} does not support bfloat16", remedy, host)
    if ranks <= len(devices):
        memory = devices[0]["memory_bytes"]
        facts = [readable("bytes", memory)] if memory else []
        facts += [report["driver"]] if report["driver"] else []
        facts += ["bfloat16"] if torch["bf16"] else []
        used = f"{len(devices)} x {devices[0]['name']}"
        yield ok("accelerator", f"{used} ({', '.join(facts)})" if facts else used, host)


def backends(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks the communication backends of torch."""
    torch = report["torch"]
    if torch is None or "problem" in torch:
        return
    if not torch["gloo"]:
        yield error("backend", "torch was built without gloo", "install a standard build of torch", host)
    elif torch["kind"] == "cuda" and not required.uses_cpu:
        if torch["nccl"]:
            yield ok("backend", f"NCCL {torch['nccl']}, gloo", host)
        else:
            yield error("backend", "torch was built without NCCL", "install a standard CUDA build of torch", host)
    else:
        yield ok("backend", "gloo", host)


def network(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks that the ranks of other hosts can reach those of this host."""
    net, variables = report["network"], report["variables"]
    if not required.several_hosts:
        return
    chosen = variables.get("GLOO_SOCKET_IFNAME")
    interface = _interface_of(net["gloo_address"], net)
    if chosen:
        unknown = [name for name in chosen.split(",") if name not in net["interfaces"]]
        if unknown:
            remedy = f"use one of {', '.join(_external(net))} in launch.environment"
            yield error("network", f"GLOO_SOCKET_IFNAME: there is no interface {', '.join(unknown)}", remedy, host)
        else:
            yield ok("network", f"gloo uses {chosen}, as GLOO_SOCKET_IFNAME says", host)
    elif net["gloo_address"] is None or ipaddress.ip_address(net["gloo_address"]).is_loopback:
        name, resolved = report["host"], ", ".join(net["name_resolves_to"])
        why = f"its name {name} resolves to {resolved}" if resolved else f"its name {name} does not resolve"
        routes = {
            peer: route["interface"] for peer, route in net["routes"].items() if route["interface"] in _external(net)
        }
        if routes:
            # As sparse_zero.ranks.rendezvous does.
            peer, interface = next(iter(routes.items()))
            yield ok("network", f"{why}: the ranks use {interface}, which reaches {peer}", host)
        else:
            external = next(iter(_external(net)), "INTERFACE")
            remedy = f"set launch.environment.GLOO_SOCKET_IFNAME={external}, or correct {name} in its /etc/hosts"
            yield error("network", f"{why}: gloo would give the other hosts a loopback address", remedy, host)
    else:
        yield ok("network", f"gloo uses {interface} ({net['gloo_address']})", host)
    yield from _nccl_interface(report, required, host)
    route = net["routes"].get(required.master)
    if route and route["address"] is None:
        remedy = "add it to its /etc/hosts or the DNS, or set launch.master_addr to an address"
        yield error("network", f"cannot resolve {required.master}, the host of rank 0", remedy, host)
    elif route and ipaddress.ip_address(route["address"]).is_loopback and host != required.master:
        remedy = "correct its /etc/hosts, or set launch.master_addr to an address"
        message = f"resolves {required.master}, the host of rank 0, to itself ({route['address']})"
        yield error("network", message, remedy, host)


def _nccl_interface(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    chosen = report["variables"].get("NCCL_SOCKET_IFNAME", "")
    if not chosen or chosen.startswith("^") or not accelerator_count(report, required):
        return
    # NCCL reads the names as prefixes, unless they follow a =.
    exact, names = chosen.startswith("="), chosen.removeprefix("=").split(",")
    known = report["network"]["interfaces"]
    if not any(own == name or (not exact and own.startswith(name)) for name in names for own in known):
        remedy = f"use one of {', '.join(_external(report['network']))} in launch.environment"
        yield error("network", f"NCCL_SOCKET_IFNAME={chosen} matches no interface", remedy, host)


def _interface_of(address: str | None, net: dict[str, Any]) -> str | None:
    return next((name for name, own in net["interfaces"].items() if address in own), None)


def _external(net: dict[str, Any]) -> list[str]:
    """The interfaces that have an address other than loopback."""
    loopback = {name: [ipaddress.ip_address(a).is_loopback for a in own] for name, own in net["interfaces"].items()}
    return [name for name, own in loopback.items() if own and not all(own)]


def shared_memory(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks the free space in /dev/shm."""
    free, ranks = report["shared_memory_bytes"], rank_count(report, required)
    if free is None:
        return
    if ranks > 1 and free < ranks * SHARED_MEMORY_PER_RANK_BYTES:
        remedy = "docker run --shm-size=8g (or --ipc=host); on a host: mount -o remount,size=8g /dev/shm"
        needed = readable("bytes", ranks * SHARED_MEMORY_PER_RANK_BYTES)
        message = f"/dev/shm has {readable('bytes', free)} free, {ranks} ranks may need {needed}"
        yield warning("shared memory", message, remedy, host)
    else:
        yield ok("shared memory", f"{readable('bytes', free)} free", host)


def port(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks that launch.master_port is free, on the host whose report tested it."""
    number = required.recipe.launch.master_port if required.recipe else "auto"
    if report["port_is_free"] is None:
        return
    if report["port_is_free"]:
        yield ok("port", f"{number} is free", host)
    else:
        yield error("port", f"launch.master_port: {number} is in use", "use another port, or auto", host)


def inputs(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks the recipe's files, its model and its data."""
    for path, checksum in report["files"].items():
        if checksum is None:
            yield error("files", f"{path} does not exist", "copy it, or start from a shared directory", host)
    for key, source in report["sources"].items():
        if source["problem"]:
            reason = source["problem"] if source["place"] == "package" else f"{source['path']}: {source['problem']}"
            yield error("files", f"{key}: {reason}", "copy it to that host, or to a disk that all hosts share", host)
        elif source["place"] == "hub" and not source["cached"]:
            load = f"hf download {'--repo-type dataset ' if key == 'data.path' else ''}{source['path']}"
            message = f"{key}: {source['path']} is not in the cache"
            if source["offline"]:
                remedy = f"run on that host, with internet access: {load}; or set HF_HOME to a cache that has it"
                yield error("files", f"{message}, and HF_HUB_OFFLINE is set", remedy, host)
            else:
                remedy = f"download it first: {load}; this fails if the hub has no such name"
                yield warning("files", f"{message} yet", remedy, host)
        else:
            where = {"hub": "is in the cache"}.get(source["place"], "exists")
            yield ok("files", f"{key}: {source['name']} {where}", host)


def disk(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks that checkpoints can be written to training.output_dir, and that there is space for them."""
    place = report["output"]
    if place is None:
        return
    directory = required.training.get("output_dir")
    if not place["is_directory"]:
        yield error("disk", f"training.output_dir: {place['existing']} is a file", "use another directory", host)
        return
    if not place["is_writable"]:
        remedy = "use another directory, or give this user write permission"
        yield error("disk", f"training.output_dir: {place['existing']} is not writable", remedy, host)
        return
    free, size = place["free_bytes"], checkpoint_bytes(report, required)
    if free is None:
        return
    kept = (required.training.get("save_total_limit") or 1) + 1
    message = f"{readable('bytes', free)} free for {directory}"
    message += f"; a checkpoint is about {readable('bytes', size)}" if size else ""
    if size and free < kept * size:
        remedy = "free disk space, or set training.save_total_limit"
        yield error("disk", f"{message}, and {kept} must fit", remedy, host)
    elif free < MIN_DISK_BYTES:
        yield warning("disk", message, "free disk space", host)
    else:
        yield ok("disk", message, host)


def checkpoint_bytes(report: Report, required: HostRequirements) -> int | None:
    """The size of one checkpoint, all shards together, in bytes. None if the headers of the model's files do not tell,
    or the run saves none.
    """
    scalars = report["sources"].get("model.name", {}).get("scalars")
    if not (required.recipe and scalars) or required.training.get("save_strategy") == "no":
        return None
    density = required.recipe.sparse.model_density
    return None if density is None else round(CHECKPOINT_BYTES_PER_SCALAR * density * scalars)


def visible_devices(report: Report, required: HostRequirements, host: str | None) -> Iterator[Finding]:
    """Checks a CUDA_VISIBLE_DEVICES that the user has set. Slurm sets it for its own jobs."""
    value = report["variables"].get("CUDA_VISIBLE_DEVICES")
    if value is None or required.uses_cpu or not report["device_nodes"] or "SLURM_JOB_ID" in report["variables"]:
        return
    remedy = "unset it"
    if required.several_hosts:
        remedy = "unset it; the hostfile's slots and launch.include choose the GPUs"
    is_deepspeed = required.recipe is None or required.recipe.launch.launcher == "deepspeed"
    if not value.strip():
        yield warning("environment", "CUDA_VISIBLE_DEVICES is empty and hides every GPU", remedy, host)
    elif is_deepspeed and re.search("[A-Za-z]", value):
        message = f"CUDA_VISIBLE_DEVICES={value}: DeepSpeed's runner accepts numbers only"
        yield error("environment", message, "use numbers, or launch.launcher=torchrun", host)
    else:
        yield warning("environment", f"CUDA_VISIBLE_DEVICES={value}: the run uses no other GPU", remedy, host)
