"""Checks that the hosts of a run are alike: pure functions of their reports."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.doctor.host_report import Report

MAX_CLOCK_SECONDS = 2.0
SAME_VERSION_REQUIRED = ("sparse-zero", "torch", "deepspeed", "transformers")

Reports = Mapping[str, Report]
"""Reports by host name, in the order of the run. Every host is compared with the first."""


def compare_hosts(reports: Reports, clock_offsets: Mapping[str, float], use_cpu: bool = False) -> list[Finding]:
    """Compare versions, source code, files, accelerators, clocks and the shared output directory of all hosts.

    Args:
        reports: see `Reports`.
        clock_offsets: seconds by which each host's clock is ahead of this machine's, by host name.
        use_cpu: the run uses no accelerator, so accelerators are not compared.

    Returns: one finding for each difference, or a single "ok"; nothing for fewer than two hosts.
    """
    if len(reports) < 2:
        return []
    found = [*_versions(reports), *_code(reports), *_files(reports), *_sources(reports)]
    found += [] if use_cpu else [*_accelerators(reports)]
    found += [*clocks(clock_offsets), *shared_output(reports)]
    if not any(finding.severity != "ok" for finding in found):
        found.append(ok("consistency", f"{len(reports)} hosts have the same versions, code, recipe and inputs"))
    return found


def _differing(reports: Reports, value: Callable[[Report], Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields (first host, other host, first host's value, other host's value) for each host that differs from the
    first. Unknown values (None) are skipped.
    """
    (first, of_first), *others = reports.items()
    for host, report in others:
        expected, actual = value(of_first), value(report)
        if expected is not None and actual is not None and expected != actual:
            yield first, host, expected, actual


def _versions(reports: Reports) -> Iterator[Finding]:
    for name in next(iter(reports.values()))["versions"]:
        for first, host, there, here in _differing(reports, lambda report, name=name: report["versions"].get(name)):
            # Patch releases of Python do not change what ranks exchange.
            fatal = name in SAME_VERSION_REQUIRED or (name == "python" and here.split(".")[:2] != there.split(".")[:2])
            report_as = error if fatal else warning
            remedy = f"install {name} {there} on that host" if name != "python" else "use the same Python on all hosts"
            yield report_as("consistency", f"{name} is {here}, but {there} on {first}", remedy, host)


def _code(reports: Reports) -> Iterator[Finding]:
    for first, host, _, _ in _differing(reports, lambda report: report["code"]):
        message = f"the source code of sparse_zero or rpn differs from that on {first}, with the same version number"
        yield error("consistency", message, "check out the same commit on all hosts", host)


def _files(reports: Reports) -> Iterator[Finding]:
    for path in next(iter(reports.values()))["files"]:
        for first, host, _, _ in _differing(reports, lambda report, path=path: report["files"].get(path)):
            yield error("consistency", f"{path} differs from the file on {first}", f"copy it from {first}", host)


def _sources(reports: Reports) -> Iterator[Finding]:
    for key in next(iter(reports.values()))["sources"]:

        def content(report: Report, key: str = key) -> str | None:
            return report["sources"].get(key, {}).get("content")

        for first, host, _, _ in _differing(reports, content):
            path = reports[host]["sources"][key]["path"]
            yield error("consistency", f"{key}: {path} differs from that on {first}", f"copy it from {first}", host)


def _accelerators(reports: Reports) -> Iterator[Finding]:
    def devices(report: Report) -> list[str] | None:
        torch = report["torch"]
        return None if torch is None or "problem" in torch else sorted({each["name"] for each in torch["devices"]})

    for first, host, there, here in _differing(reports, devices):
        mine, theirs = ", ".join(here) or "no accelerator", ", ".join(there) or "no accelerator"
        message = f"has {mine}, but {first} has {theirs}"
        if here and there:
            yield warning("consistency", message, "every step waits for the slowest accelerator", host)
        else:
            remedy = "exclude that host (launch.exclude), or train on the CPU on all hosts (training.use_cpu=true)"
            yield error("consistency", message, remedy, host)


def clocks(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """Yields a warning for each host whose clock differs by more than MAX_CLOCK_SECONDS.

    Args: offsets: seconds by which each host's clock is ahead of this machine's, by host name.
    """
    for host, offset in offsets.items():
        if abs(offset) > MAX_CLOCK_SECONDS:
            side = "ahead of" if offset > 0 else "behind"
            remedy = "synchronise it with a time server (chronyd, systemd-timesyncd)"
            yield warning("clock", f"its clock is {abs(offset):.1f} s {side} this machine's", remedy, host)


def shared_output(reports: Reports) -> Iterator[Finding]:
    """Checks that every host sees the marker file that this machine wrote to the disk of training.output_dir."""
    seen = {host: report["marker_is_seen"] for host, report in reports.items() if report["marker_is_seen"] is not None}
    for host, is_seen in seen.items():
        if not is_seen:
            message = (
                "does not see a file that this machine wrote at training.output_dir: the shards of a checkpoint "
                "would be on different disks"
            )
            remedy = "use a directory that all hosts share (NFS, Lustre) as training.output_dir"
            yield error("shared disk", message, remedy, host)
    if seen and all(seen.values()):
        yield ok("shared disk", f"{len(seen)} hosts see a file that this machine wrote at training.output_dir")
