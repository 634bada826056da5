"""Measures the links between the ranks of a run: starts sparse_zero.ranks.link_probe with the run's launcher."""

import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.report import readable
from launcher.ways.command import SAFE_PATH, Command
from launcher.ways.local import torchrun_here
from sparse_zero.ranks.link_probe import MARK, SMALL_BYTES, pairs
from sparse_zero.ranks.network import free_port

PROBE_SECONDS = 60.0
"""The most that the ranks may take to connect, and again to measure; see sparse_zero.ranks.link_probe."""
_STARTING_SECONDS = 60.0
SLOW_BYTES_PER_SECOND = 100e6
"""Less than a 1 Gbit/s cable carries."""
SLOW_LATENCY_SECONDS = 2e-3
OUTLIER_FACTOR = 4.0
"""A link this many times slower than the median is an outlier."""


@dataclass
class LinkMeasurements:
    """The output of all ranks of the probe."""

    hosts: dict[int, str] = field(default_factory=dict)
    """Host names by rank, of the ranks that started."""
    world_size: int | None = None
    links: list[dict[str, Any]] = field(default_factory=list)
    """`from`, `to` (ranks), `latency_seconds`, `bytes_per_second` and `right` (the data arrived unchanged)."""
    collectives: list[dict[str, Any]] = field(default_factory=list)
    """`collective`, `bytes`, `seconds`, `bytes_per_second` and `right` (the result is correct)."""
    problems: list[str] = field(default_factory=list)
    status: int | None = None
    """The launcher's exit status. None: it did not end in time and was killed."""
    last_words: str = ""
    """The last error message in the output, or its last line."""


def probe_arguments(use_cpu: bool, seconds: float = PROBE_SECONDS) -> list[str]:
    """The module that the ranks run, and its arguments."""
    return ["sparse_zero.ranks.link_probe", "--seconds", f"{seconds:g}", *(["--cpu"] if use_cpu else [])]


def local_probe_command(ranks: int, use_cpu: bool) -> Command:
    """The command that starts the probe on this machine, without a recipe."""
    argv = [*torchrun_here(ranks, free_port()), "-m"]
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **SAFE_PATH}
    return Command([*argv, *probe_arguments(use_cpu)], environment)


def measure(command: Command, seconds: float = 2 * PROBE_SECONDS + _STARTING_SECONDS) -> LinkMeasurements:
    """Run the probe until it ends, or for at most `seconds`, and kill its processes that are left on this machine.
    Ranks on other hosts end by themselves.

    Raises UserError: the launcher's files cannot be written.
    """
    with command.written_files(), tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command.argv,
            env=command.environ(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        output.seek(0)
        return parse_output(output.read(), status)


def _end(process: subprocess.Popen) -> None:
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for member in family:
            try:
                member.send_signal(signum)
            except psutil.NoSuchProcess:
                continue
        _, family = psutil.wait_procs(family, timeout=5)
    process.wait()


def parse_output(output: str, status: int | None) -> LinkMeasurements:
    """Parse the output of a launcher that started the probe. A launcher may prefix each line with the rank.

    Args: status: the launcher's exit status.
    """
    measured, other_lines = LinkMeasurements(status=status), []
    for line in output.splitlines():
        # Two ranks may print on the same line.
        other, *texts = line.split(MARK)
        if not texts:
            other_lines += [other.strip()] if other.strip() else []
        for text in texts:
            fact, _ = json.JSONDecoder().raw_decode(text)
            if "rank" in fact:
                measured.hosts[fact["rank"]], measured.world_size = fact["host"], fact["world_size"]
            elif "link" in fact:
                measured.links.append(fact["link"])
            elif "collective" in fact:
                measured.collectives.append(fact)
            else:
                measured.problems.append(fact["problem"])
    # pdsh and torchrun print more lines after the error.
    last_line = other_lines[-1] if other_lines else ""
    measured.last_words = next((line for line in reversed(other_lines) if "Error" in line), last_line)
    return measured


def check_links(measured: LinkMeasurements) -> Iterator[Finding]:
    """Check that all ranks started, connected and measured, and that no link is slow or corrupts data."""
    details = f": {measured.last_words}" if measured.last_words else ""
    if not measured.hosts:
        how = "in time" if measured.status is None else f"(status {measured.status})"
        remedy = "check that the hosts reach each other (firewall); run the command of `train ... --dry-run` by hand"
        yield error("ranks", f"the launcher started no rank {how}{details}", remedy)
        return
    absent = sorted(set(range(measured.world_size or 0)) - set(measured.hosts))
    if absent:
        started = ", ".join(dict.fromkeys(measured.hosts.values()))
        numbers = ", ".join(map(str, absent))
        remedy = "read the launcher's messages, and try ssh to the missing hosts"
        message = f"rank {numbers} of {measured.world_size} did not start; the ranks on {started} did"
        yield error("ranks", message, remedy)
    for problem in dict.fromkeys(measured.problems):
        remedy = "open the port between the hosts (firewall), or set launch.master_addr and launch.master_port"
        yield error("ranks", problem, remedy)
    missing = _unfinished(measured)
    if missing and not absent and not measured.problems:
        remedy = "check GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO shows what NCCL chooses"
        where = "" if len(missing) == len(pairs(measured.world_size or 0)) else f" (first missing: {missing[0]})"
        yield error("ranks", f"the ranks started, but did not finish measuring{where}{details}", remedy)
    elif measured.status and not absent and not measured.problems:
        message = f"all links were measured, but the launcher exited with status {measured.status}"
        yield warning("ranks", message, "run the command of `sparse-zero train ... --dry-run` by hand")
    yield from _corrupting_links(measured)
    yield from _slow_links(measured)
    for each in measured.collectives:
        if each["bytes"] > SMALL_BYTES and each["right"]:
            hosts = len(set(measured.hosts.values()))
            rate = readable("bytes", round(each["bytes_per_second"]))
            message = f"{measured.world_size} ranks on {hosts} host{'s' if hosts > 1 else ''} connected"
            yield ok("ranks", f"{message}; all-reduce {rate}/s" if (measured.world_size or 0) > 1 else message)


def _unfinished(measured: LinkMeasurements) -> list[str]:
    """The names of the links that were not measured, or "the all-reduce" if only that is missing."""
    done = {(link["from"], link["to"]) for link in measured.links}
    named = [_name(measured, *pair) for pair in pairs(measured.world_size or 0) if pair not in done]
    return named or ([] if len(measured.collectives) == 2 else ["the all-reduce"])


def _corrupting_links(measured: LinkMeasurements) -> Iterator[Finding]:
    remedy = "replace the cable, the network card or the device; NCCL_P2P_DISABLE=1 shows whether PCIe is the cause"
    for link in measured.links:
        if not link["right"]:
            yield error("links", f"{_name(measured, link['from'], link['to'])}: corrupts data", remedy)
    if not all(each["right"] for each in measured.collectives):
        yield error("links", "an all-reduce of ones gave a wrong sum", remedy)


def _slow_links(measured: LinkMeasurements) -> Iterator[Finding]:
    remedy = (
        "check its cable and speed (ethtool), and that the ranks use the fast interface (GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME)"
    )
    for between_hosts in (False, True):
        links = [link for link in measured.links if _is_between_hosts(measured, link) == between_hosts]
        for key, unit, sign in (("bytes_per_second", _rate, 1), ("latency_seconds", _time, -1)):
            median = statistics.median(link[key] for link in links) if links else 0.0
            for link in links:
                value, name = link[key], _name(measured, link["from"], link["to"])
                is_outlier = value < median / OUTLIER_FACTOR if sign > 0 else value > median * OUTLIER_FACTOR
                limit = SLOW_BYTES_PER_SECOND if sign > 0 else SLOW_LATENCY_SECONDS
                is_slow = between_hosts and (value < limit if sign > 0 else value > limit)
                if is_outlier and len(links) > 2:
                    yield warning("links", f"{name}: {unit(value)}; the median is {unit(median)}", remedy)
                elif is_slow:
                    yield warning("links", f"{name}: {unit(value)}", remedy)


def _rate(value: float) -> str:
    return f"{readable('bytes', round(value))}/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _is_between_hosts(measured: LinkMeasurements, link: dict[str, Any]) -> bool:
    return measured.hosts.get(link["from"]) != measured.hosts.get(link["to"])


def _name(measured: LinkMeasurements, first: int, second: int) -> str:
    ends = [f"{measured.hosts.get(rank, '?')} (rank {rank})" for rank in (first, second)]
    return " - ".join(ends)


def table_rows(measured: LinkMeasurements) -> list[dict[str, str]]:
    """The measurements as rows of a table."""
    places = {rank: f"{host} rank {rank}" for rank, host in measured.hosts.items()}
    table = [
        {
            "measured": "link",
            "from": places.get(link["from"], "?"),
            "to": places.get(link["to"], "?"),
            "latency": _time(link["latency_seconds"]),
            "bandwidth": _rate(link["bytes_per_second"]),
        }
        for link in measured.links
    ]
    for each in measured.collectives:
        name = f"all-reduce of {readable('bytes', each['bytes'])}"
        rate = _rate(each["bytes_per_second"]) if each["bytes"] > SMALL_BYTES else ""
        ranks = f"{measured.world_size} ranks"
        table.append({"measured": name, "from": ranks, "to": "", "latency": _time(each["seconds"]), "bandwidth": rate})
    return table
