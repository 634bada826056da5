"""The links between the ranks of a run: starts sparse_zero.ranks.link_probe as the run would be started, and judges
what it measures.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.report import readable
from launcher.ways.command import SAFE_PATH, Command
from sparse_zero.ranks.link_probe import MARK, SMALL_BYTES, pairs

SECONDS = 60.0
"""For the ranks to meet, and again to measure, at most; see sparse_zero.ranks.link_probe."""
_STARTING_SECONDS = 60.0
SLOW_BYTES_PER_SECOND = 100e6
"""Less than a cable of 1 Gbit/s carries."""
SLOW_LATENCY_SECONDS = 2e-3
OUTLIER = 4.0
"""How many times slower than the median of its kind a link must be to be named."""


@dataclass
class Measured:
    """What the ranks have said."""

    hosts: dict[int, str] = field(default_factory=dict)
    """By rank, of those that came up."""
    world_size: int | None = None
    links: list[dict[str, Any]] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    status: int | None = None
    """Of the launcher; None: it had to be ended."""
    last_words: str = ""


def probe_words(use_cpu: bool, seconds: float = SECONDS) -> list[str]:
    """The module that the ranks run, and its arguments."""
    return ["sparse_zero.ranks.link_probe", "--seconds", f"{seconds:g}", *(["--cpu"] if use_cpu else [])]


def command_here(ranks: int, use_cpu: bool) -> Command:
    """Starts the probe on this machine's devices, without a recipe."""
    argv = [sys.executable, "-m", "launcher.ways.torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **SAFE_PATH}
    return Command([*argv, *probe_words(use_cpu)], environment)


def measure(command: Command, seconds: float = 2 * SECONDS + _STARTING_SECONDS) -> Measured:
    """Run the probe to its end, and leave none of it on this machine. Remote ranks end by themselves.

    Raises UserError: the launcher's files cannot be written, or it is not there.
    """
    command.write_files()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command.argv,
            env=command.environ(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        said.seek(0)
        return read(said.read(), status)


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


def read(output: str, status: int | None) -> Measured:
    """What the ranks said, from what a launcher printed: it may put a rank's name before each line."""
    measured, said = Measured(status=status), []
    for line in output.splitlines():
        # Two ranks' words may have come out on one line.
        other, *texts = line.split(MARK)
        if not texts:
            said += [other.strip()] if other.strip() else []
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
    # pdsh and torchrun have more to say after the line that tells.
    measured.last_words = next((line for line in reversed(said) if "Error" in line), said[-1] if said else "")
    return measured


def judge(measured: Measured) -> Iterator[Finding]:
    """Findings from what was measured."""
    if not measured.hosts:
        said = f": {measured.last_words}" if measured.last_words else ""
        how = "in time" if measured.status is None else f"(status {measured.status})"
        cure = "see that the hosts reach each other (firewall); run by hand what `train ... --dry-run` prints"
        yield error("ranks", f"the launcher started no rank {how}{said}", cure)
        return
    absent = sorted(set(range(measured.world_size or 0)) - set(measured.hosts))
    if absent:
        there = ", ".join(dict.fromkeys(measured.hosts.values()))
        numbers = ", ".join(map(str, absent))
        cure = "see why they did not start: the launcher's own messages, and ssh to the hosts that are missing"
        yield error("ranks", f"rank {numbers} of {measured.world_size} did not start; {there} did", cure)
    for problem in dict.fromkeys(measured.problems):
        cure = "open the port between the hosts (firewall), or choose another by launch.master_addr and master_port"
        yield error("ranks", problem, cure)
    missing = _unfinished(measured)
    if missing and not absent and not measured.problems:
        said = f": {measured.last_words}" if measured.last_words else ""
        cure = "see GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO shows what NCCL chooses"
        where = "" if len(missing) == len(pairs(measured.world_size or 0)) else f" from {missing[0]} on"
        yield error("ranks", f"the ranks started, but did not finish measuring{where}{said}", cure)
    elif measured.status and not absent and not measured.problems:
        cure = "run what `sparse-zero train ... --dry-run` prints, by hand"
        yield warning("ranks", f"all was measured, but the launcher ended with status {measured.status}", cure)
    yield from _wrong(measured)
    yield from _slow(measured)
    for each in measured.collectives:
        if each["bytes"] > SMALL_BYTES and each["right"]:
            hosts = len(set(measured.hosts.values()))
            rate = readable("bytes", round(each["bytes_per_second"]))
            message = f"{measured.world_size} ranks on {hosts} host{'s' if hosts > 1 else ''} met"
            yield ok("ranks", f"{message}; all-reduce {rate}/s" if (measured.world_size or 0) > 1 else message)


def _unfinished(measured: Measured) -> list[str]:
    """The links that nobody reported, by name; something else that is missing, in a word."""
    done = {(link["from"], link["to"]) for link in measured.links}
    named = [_name(measured, *pair) for pair in pairs(measured.world_size or 0) if pair not in done]
    return named or ([] if len(measured.collectives) == 2 else ["the all-reduce"])


def _wrong(measured: Measured) -> Iterator[Finding]:
    cure = "exchange the cable, the network card or the device; NCCL_P2P_DISABLE=1 shows whether it is PCIe"
    for link in measured.links:
        if not link["right"]:
            yield error("links", f"{_name(measured, link['from'], link['to'])}: what came back was changed", cure)
    if not all(each["right"] for each in measured.collectives):
        yield error("links", "an all-reduce of ones gave a wrong sum", cure)


def _slow(measured: Measured) -> Iterator[Finding]:
    cure = "see its cable and speed (ethtool), and that the ranks take the fast interface (GLOO_/NCCL_SOCKET_IFNAME)"
    for between_hosts in (False, True):
        links = [link for link in measured.links if _is_between_hosts(measured, link) == between_hosts]
        for key, unit, sign in (("bytes_per_second", _rate, 1), ("latency_seconds", _time, -1)):
            usual = statistics.median(link[key] for link in links) if links else 0.0
            for link in links:
                value, name = link[key], _name(measured, link["from"], link["to"])
                outlier = value < usual / OUTLIER if sign > 0 else value > usual * OUTLIER
                limit = SLOW_BYTES_PER_SECOND if sign > 0 else SLOW_LATENCY_SECONDS
                slow = between_hosts and (value < limit if sign > 0 else value > limit)
                if outlier and len(links) > 2:
                    yield warning("links", f"{name}: {unit(value)}, where the others have {unit(usual)}", cure)
                elif slow:
                    yield warning("links", f"{name}: {unit(value)}", cure)


def _rate(value: float) -> str:
    return f"{readable('bytes', round(value))}/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _is_between_hosts(measured: Measured, link: dict[str, Any]) -> bool:
    return measured.hosts.get(link["from"]) != measured.hosts.get(link["to"])


def _name(measured: Measured, first: int, second: int) -> str:
    ends = [f"{measured.hosts.get(rank, '?')} (rank {rank})" for rank in (first, second)]
    return " - ".join(ends)


def rows(measured: Measured) -> list[dict[str, str]]:
    """The measurements, for a table."""
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
