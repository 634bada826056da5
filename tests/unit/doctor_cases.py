"""Input of the doctor's tests: a host report without problems, output of the link probe, and ways to change them."""

import copy
import json
from collections.abc import Iterable
from typing import Any

from launcher.doctor import links
from launcher.doctor.findings import Finding
from launcher.doctor.host_report import Report
from sparse_zero.ranks.link_probe import MARK
from sparse_zero.recipe.recipe import Recipe

H100 = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30}

GOOD: Report = {
    "host": "n1",
    "cores": 8,
    "versions": {
        "python": "3.11.7",
        "sparse-zero": "0.1.0",
        "torch": "2.13.0+cu130",
        "deepspeed": "0.19.8",
        "transformers": "5.23.0",
        "accelerate": "1.15.0",
        "datasets": "5.2.0",
    },
    "code": "c0de",
    "tools": {"g++": "/usr/bin/g++", "ninja": "/usr/bin/ninja"},
    "operators": ["cpu_adam", "deepspeed_shm_comm"],
    "device_nodes": [f"/dev/nvidia{number}" for number in range(4)],
    "driver": "nvidia 580.65",
    "network": {
        "name_resolves_to": ["10.0.0.1"],
        "gloo_address": "10.0.0.1",
        "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]},
        "routes": {"n1": {"address": "10.0.0.1", "interface": "eth0"}},
    },
    "variables": {},
    "shared_memory_bytes": 2**34,
    "port_is_free": None,
    "files": {"recipe.yaml": "aa"},
    "sources": {
        "model.name": {
            "name": "m",
            "place": "directory",
            "path": "/m",
            "problem": None,
            "content": "bb",
            "scalars": 10**9,
        },
        "data.path": {"name": "d.csv", "place": "file", "path": "d.csv", "problem": None, "content": "cc"},
    },
    "output": {"existing": "/runs", "is_directory": True, "is_writable": True, "free_bytes": 2**40},
    "marker_is_seen": True,
    "torch": {
        "kind": "cuda",
        "devices": [H100] * 4,
        "bf16": True,
        "built_for": "CUDA 13.0",
        "nccl": "2.28.9",
        "gloo": True,
    },
    "clock": [100.0, 101.0],
}

NO_ACCELERATOR = {
    "device_nodes": [],
    "driver": None,
    "torch": {"kind": None, "devices": [], "bf16": None, "built_for": "CPU", "nccl": None, "gloo": True},
}


def report(changes: dict[str, Any] | None = None) -> Report:
    """GOOD, with `changes` by dotted keys: {"tools.ninja": None}."""
    changed = copy.deepcopy(GOOD)
    for key, value in (changes or {}).items():
        # A package's name has no dot, a file's has.
        *parents, leaf = key.split(".") if not key.startswith(("files.", "sources.")) else key.split(".", 1)
        node = changed
        for parent in parents:
            node = node[parent]
        node[leaf] = {**node[leaf], **value} if isinstance(value, dict) and leaf in node else value
    return changed


def recipe(training: dict[str, Any] | None = None, **launch: Any) -> Recipe:
    """A recipe with these keys of its launch section."""
    sections = {
        "model": {"name": "m"},
        "data": {"path": "d.csv", "columns": {"text": "t", "label": "l"}},
        "training": {"output_dir": "/runs/a", **(training or {})},
        "launch": launch,
    }
    return Recipe.model_validate(sections)


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != "ok"]


def only_problem(findings: Iterable[Finding]) -> Finding:
    found = problems(findings)
    assert len(found) == 1, found
    assert found[0].remedy, "a problem without a remedy"
    return found[0]


def probe_output(*facts: dict[str, Any], prefix: str = "") -> str:
    """The output of ranks that print `facts`. Args: prefix: added to each line by the launcher."""
    return "".join(f"{prefix}{MARK}{json.dumps(fact)}\n" for fact in facts)


def started(hosts: list[str]) -> list[dict[str, Any]]:
    """What ranks print when they start. Args: hosts: of each rank."""
    return [{"rank": rank, "world_size": len(hosts), "host": host} for rank, host in enumerate(hosts)]


def link(first: int, second: int, rate: float = 1e9, latency: float = 5e-5, right: bool = True) -> dict[str, Any]:
    """The measurement of a link. Args: rate: bytes per second; latency: seconds."""
    return {
        "link": {"from": first, "to": second, "latency_seconds": latency, "bytes_per_second": rate, "right": right}
    }


def all_reduce(right: bool = True) -> list[dict[str, Any]]:
    return [
        {"collective": "all_reduce", "bytes": size, "seconds": 1e-3, "bytes_per_second": 1e9, "right": right}
        for size in (4, 2**24)
    ]


def good_measurement() -> links.LinkMeasurements:
    """Of two ranks on two hosts."""
    return links.parse_output(probe_output(*started(["n1", "n2"]), link(0, 1), *all_reduce()), 0)
