"""Starts one_rank.py on some ranks, in separate processes, and reads their results."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import Row

SCRIPT = Path(__file__).with_name("one_rank.py")
SECONDS = 590


def run(method: str, way: str, ranks: int, options: dict[str, object]) -> Row:
    """Measure a method on some ranks.

    Args: options: other options of one_rank.py, by name.

    Returns: method, way and number of ranks, and either `ranks`, the results of each rank, or `failure`, the error.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if way != "plain" else []
    extra = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    row: Row = {"method": method, "way": way, "count": ranks}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *launch, str(SCRIPT), "--method", method, "--way", way, "--out", out, *extra]
        status, printed = _output_of(command)
        if status:
            return row | {"failure": failure_of(printed) or f"exit status {status}"}
        found = [json.loads(Path(out, f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return row | {"ranks": found}


def _output_of(command: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its ranks
            process.wait()
            return 1, f"TimeoutError: not done after {SECONDS} s"
        output.seek(0)
        return status, output.read()


def failure_of(printed: str) -> str | None:
    """The exception at the end of a traceback, of the first rank that has one."""
    found = re.search(r"^(?:\[\w+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", printed, re.MULTILINE)
    return found.group(1) if found else None


def largest(row: Row, figure: str) -> int | float | None:
    """The largest value of all ranks; None if no rank has it."""
    values = [rank[figure] for rank in row["ranks"] if rank[figure] is not None]
    return max(values, default=None)
