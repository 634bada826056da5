"""Where the hosts of a run differ: pure functions of their reports."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.doctor.host_report import Report

MOST_CLOCK_SECONDS = 2.0
MUST_BE_EQUAL = ("sparse-zero", "torch", "deepspeed", "transformers")

Reports = Mapping[str, Report]
"""By the hosts' names, in the order of the run; all differ from the first."""


def compare(reports: Reports, clock_offsets: Mapping[str, float], use_cpu: bool = False) -> list[Finding]:
    """All that differs between hosts, or that nothing does."""
    if len(reports) < 2:
        return []
    found = [*_versions(reports), *_code(reports), *_files(reports), *_sources(reports)]
    found += [] if use_cpu else [*_accelerators(reports)]
    found += [*clocks(clock_offsets), *sharing(reports)]
    if not any(finding.severity != "ok" for finding in found):
        found.append(ok("agreement", f"{len(reports)} hosts have the same versions, code, recipe and inputs"))
    return found


def _differing(reports: Reports, value: Callable[[Report], Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """(the first host, another, and the value of each) for each host whose value is known and another."""
    (first, of_first), *others = reports.items()
    for host, report in others:
        mine, yours = value(of_first), value(report)
        if mine is not None and yours is not None and mine != yours:
            yield first, host, mine, yours


def _versions(reports: Reports) -> Iterator[Finding]:
    for name in next(iter(reports.values()))["versions"]:
        for first, host, there, here in _differing(reports, lambda report, name=name: report["versions"].get(name)):
            # Python's third number changes nothing that ranks exchange.
            fatal = name in MUST_BE_EQUAL or (name == "python" and here.split(".")[:2] != there.split(".")[:2])
            say = error if fatal else warning
            cure = f"install {name} {there} there" if name != "python" else "use one Python everywhere"
            yield say("agreement", f"{name} is {here}, on {first} {there}", cure, host)


def _code(reports: Reports) -> Iterator[Finding]:
    for first, host, _, _ in _differing(reports, lambda report: report["code"]):
        message = f"the source of sparse_zero or rpn is not that of {first}, under one version number"
        yield error("agreement", message, "bring the checkouts to one commit", host)


def _files(reports: Reports) -> Iterator[Finding]:
    for path in next(iter(reports.values()))["files"]:
        for first, host, _, _ in _differing(reports, lambda report, path=path: report["files"].get(path)):
            yield error("agreement", f"{path} is not the file that {first} has", f"copy it from {first}", host)


def _sources(reports: Reports) -> Iterator[Finding]:
    for key in next(iter(reports.values()))["sources"]:

        def content(report: Report, key: str = key) -> str | None:
            return report["sources"].get(key, {}).get("content")

        for first, host, _, _ in _differing(reports, content):
            path = reports[host]["sources"][key]["path"]
            yield error("agreement", f"{key}: {path} is not what {first} has", f"copy it from {first}", host)


def _accelerators(reports: Reports) -> Iterator[Finding]:
    def devices(report: Report) -> list[str] | None:
        torch = report["torch"]
        return None if torch is None or "problem" in torch else sorted({each["name"] for each in torch["devices"]})

    for first, host, there, here in _differing(reports, devices):
        mine, yours = ", ".join(here) or "no accelerator", ", ".join(there) or "no accelerator"
        if here and there:
            yield warning("agreement", f"has {mine}, {first} {yours}", "the slower ones set the pace", host)
        else:
            cure = "leave it out (launch.exclude), or train all on the CPU (training.use_cpu=true)"
            yield error("agreement", f"has {mine}, {first} {yours}", cure, host)


def clocks(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """Hosts whose clock is certainly off. Args: offsets: seconds ahead of this machine's clock, by host."""
    for host, offset in offsets.items():
        if abs(offset) > MOST_CLOCK_SECONDS:
            side = "ahead of" if offset > 0 else "behind"
            cure = "let it follow a time server (chronyd, systemd-timesyncd)"
            yield warning("clock", f"its clock is {abs(offset):.1f} s {side} this machine's", cure, host)


def sharing(reports: Reports) -> Iterator[Finding]:
    """Whether all hosts saw the file that this machine had written beside training.output_dir."""
    seen = {host: report["marker_is_seen"] for host, report in reports.items() if report["marker_is_seen"] is not None}
    for host, is_seen in seen.items():
        if not is_seen:
            message = "does not see what this machine writes at training.output_dir: a checkpoint would be in pieces"
            yield error("sharing", message, "give a directory on a disk that all hosts share (NFS, Lustre)", host)
    if seen and all(seen.values()):
        yield ok("sharing", f"{len(seen)} hosts see what this machine writes at training.output_dir")
