"""Measures the figures that want a GPU, for as long as one is there.

    python benchmarks/gpu.py --seconds 600                 what is missing and then the oldest, by worth, in 600 s
    python benchmarks/gpu.py --list                        what it would measure, in this order, and what it cannot
    python benchmarks/gpu.py --seconds 300 --only "step, 1B"       figures whose names contain this text
    python benchmarks/gpu.py --seconds 600 --out DIR       write what is new to DIR/gpu.jsonl instead
    python benchmarks/gpu.py --add DIR/gpu.jsonl           no runs: add these to benchmarks/results
    python benchmarks/gpu.py --cpu --seconds 300 --out DIR         tiny shapes on a CPU, to try this program

Each figure is measured by one of the programs in this directory, in a process of its own with a limit; gpu_figures.py
lists them. A figure is started only if its estimate (the time that it took before, else that of the list) fits into
what is left. Results are appended to benchmarks/results/gpu.jsonl, one line each with card, versions and date, and
gpu.md shows the newest of each. A figure that cannot run on this machine (a package is missing, the card is too small)
is named with the reason. `--model` and `--gsm8k` are for the quality figures: see gsm8k.py.

torch, transformers, peft, Triton, pydantic and xxhash are enough. Where the last two are missing, put them into a
directory with `pip install --target DIR pydantic xxhash`, and set PYTHONPATH.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_figures import QUALITY, Figure, Row, figures, quality_rows
from tables import RESULTS, table

HERE = Path(__file__).parent
PACKAGES = ("torch", "triton", "transformers", "peft")
MARGIN = 1.2
"""How much longer than before a figure may take, when it is planned."""


@dataclass(frozen=True)
class Machine:
    """What the figures run on."""

    name: str
    device: str
    gibibytes: float

    @classmethod
    def here(cls, on_cpu: bool) -> "Machine":
        if on_cpu:
            return cls("CPU, tiny shapes", "cpu", float("inf"))
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return cls(torch.cuda.get_device_name(), "cuda", memory)


def obstacle(figure: Figure, machine: Machine, arguments: argparse.Namespace) -> str | None:
    """Why a figure cannot be measured here; None if it can."""
    missing = [name for name in figure.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if figure.only_cuda and machine.device == "cpu":
        return "it needs a GPU"
    if machine.device != "cpu" and figure.gibibytes > machine.gibibytes:
        return f"it needs {figure.gibibytes} GiB, {machine.name} has {machine.gibibytes:.0f}"
    if figure.sources and not (arguments.model and arguments.gsm8k):
        return "it needs --model and --gsm8k"
    return None


def in_order(listed: list[Figure], records: list[Row]) -> list[Figure]:
    """The missing figures by worth, then the others from the oldest to the newest."""
    dates = {record["figure"]: record["date"] for record in records}
    return sorted(listed, key=lambda figure: (dates.get(figure.name, ""), -figure.worth))


def estimate(figure: Figure, records: list[Row], machine: Machine) -> float:
    """Seconds, as the figure took on this machine before, with a margin, or the listed estimate."""
    taken = [r["seconds"] for r in records if (r["figure"], r["card"]) == (figure.name, machine.name)]
    return MARGIN * taken[-1] if taken else figure.seconds


def command(figure: Figure, machine: Machine, arguments: argparse.Namespace, out: Path) -> list[str]:
    """The command that measures a figure and writes `out`."""
    given = list(figure.arguments)
    if machine.device == "cpu":
        for name, *values in _options(figure.tiny):
            given = [word for option in _options(given) if option[0] != name for word in option]
            given += [name, *values]
    if figure.methods:
        given += ["--methods", *figure.methods]
    if figure.sources:
        given += ["--model", str(arguments.model), "--gsm8k", str(arguments.gsm8k)]
    if not figure.only_cuda:
        given += ["--device", machine.device]
    return [sys.executable, str(HERE / figure.script), *given, "--json", str(out)]


def _options(words: list[str] | tuple[str, ...]) -> list[list[str]]:
    """Words of a command by option: [--name, value, ...]."""
    options: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            options.append([])
        options[-1].append(word)
    return options


def measure(figure: Figure, machine: Machine, arguments: argparse.Namespace, limit: float) -> tuple[Row | None, str]:
    """Returns: the record, or None and why there is none."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "result.json")
        words = command(figure, machine, arguments, out)
        started = time.monotonic()
        with Path(directory, "output").open("w+") as output:
            # A session of its own: a program may start others, which must end with it
            process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                return None, f"stopped after {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            seconds = time.monotonic() - started
            output.seek(0)
            lines = [line for line in output.read().splitlines() if line.strip()]
        if status or not out.exists():
            return None, f"exit status {status}: {lines[-1] if lines else 'it printed nothing'}"
        rows = figure.rows(json.loads(out.read_text()))
    shown = " ".join(["python", f"benchmarks/{figure.script}", *words[2:-2]])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"figure": figure.name, "card": machine.name, "date": now, "versions": versions(), "command": shown}
    return record | {"seconds": round(seconds, 1), "rows": rows}, ""


def versions() -> dict[str, str]:
    """Versions of the packages that decide about speed."""
    found = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def run(machine: Machine, arguments: argparse.Namespace, records: list[Row], keep: Path) -> list[Row]:
    """Measure until the time is over. Returns: the new records, which are appended to the file `keep`."""
    ends, added, tried = time.monotonic() + arguments.seconds, [], set()
    while True:
        left = ends - time.monotonic()
        # Anew after each figure: a result may decide which others are wanted
        fitting = (
            figure
            for figure in in_order(chosen(arguments, records), records)
            if figure.name not in tried
            and not obstacle(figure, machine, arguments)
            and estimate(figure, records, machine) <= left
        )
        if (figure := next(fitting, None)) is None:
            return added
        tried.add(figure.name)
        record, reason = measure(figure, machine, arguments, left)
        if record is None:
            print(f"{figure.name}: {reason}", flush=True)
            continue
        added.append(record)
        records = [*records, record]
        keep.parent.mkdir(parents=True, exist_ok=True)
        with keep.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"## {figure.name}, {record['seconds']} s\n\n{_table(record['rows'])}\n", flush=True)


def chosen(arguments: argparse.Namespace, records: list[Row]) -> list[Figure]:
    wanted = arguments.only or [""]
    return [figure for figure in figures(records) if any(text in figure.name for text in wanted)]


def read_records(path: Path) -> list[Row]:
    """The records of a file, the oldest first."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines if line), key=lambda record: record["date"])


def page(records: list[Row]) -> str:
    """The newest record of each figure and card. Those of the quality are in one table."""
    newest = {(record["figure"], record["card"]): record for record in records}
    quality = [record for record in newest.values() if record["figure"].startswith(QUALITY)]
    others = [record for record in newest.values() if not record["figure"].startswith(QUALITY)]
    places = {figure.name: place for place, figure in enumerate(figures(records))}
    parts = ["# Figures from GPUs", "Made by `python benchmarks/gpu.py`: the newest of each figure and card."]
    for record in sorted(others, key=lambda record: places.get(record["figure"], len(places))):
        parts += [f"## {record['figure']}", _origin(record), f"`{record['command']}`", _table(record["rows"])]
    if quality:
        parts += [f"## {QUALITY}: loss on held-out answers", _origin(quality[-1]), _table(quality_rows(quality))]
    return "\n\n".join(parts)


def _origin(record: Row) -> str:
    installed = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"{record['card']}, {record['date'][:10]}; {installed}."


def _table(rows: list[Row]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    return table(header, [[_cell(row.get(name)) for name in header] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(machine: Machine, arguments: argparse.Namespace, records: list[Row]) -> None:
    """Print what would be measured."""
    dates = {record["figure"]: record["date"][:10] for record in records}
    lines = []
    for figure in in_order(chosen(arguments, records), records):
        reason = obstacle(figure, machine, arguments)
        seconds = f"{estimate(figure, records, machine):.0f}"
        lines.append([figure.name, str(figure.worth), seconds, dates.get(figure.name, "missing"), reason or ""])
    print(f"{machine.name}\n\n{table(['figure', 'worth', 's', 'measured', 'cannot run'], lines)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="time for all figures")
    parser.add_argument("--list", action="store_true", help="no runs: show the order, and what cannot run")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="figures whose names contain one of these texts")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on a CPU, to try this program; needs --out")
    parser.add_argument("--out", type=Path, help="a directory for what is new, instead of benchmarks/results")
    parser.add_argument("--add", type=Path, nargs="+", metavar="FILE", help="no runs: add the records of these files")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct, for the quality figures")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K, for the quality figures")
    arguments = parser.parse_args()
    kept = RESULTS / "gpu.jsonl"
    if arguments.add:
        add(arguments.add, kept)
        return
    if arguments.cpu and not arguments.list and not arguments.out:
        parser.error("--cpu needs --out: figures of tiny shapes do not belong into benchmarks/results")
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu tries this program with tiny shapes")
    machine, records = Machine.here(arguments.cpu), read_records(kept)
    if arguments.list:
        show(machine, arguments, records)
        return
    if not arguments.seconds:
        parser.error("give --seconds, or --list")
    keep = arguments.out / "gpu.jsonl" if arguments.out else kept
    run(machine, arguments, records + (read_records(keep) if keep != kept else []), keep)
    keep.with_suffix(".md").write_text(page(read_records(keep)) + "\n")


def add(files: list[Path], kept: Path) -> None:
    """Add records that are not there yet, and write the page again."""
    records = read_records(kept)
    new = [record for file in files for record in read_records(file) if record not in records]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in new)
    kept.with_suffix(".md").write_text(page(read_records(kept)) + "\n")
    print(f"{len(new)} added to {kept}")


if __name__ == "__main__":
    main()
