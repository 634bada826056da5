"""The log of each rank, written by processes that print, warn, fail and crash."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_zero import UserError
from sparse_zero.ranks.rank_log import open_rank_log, without_progress_bars

OPEN = """
import os, sys
from pathlib import Path
from sparse_zero.ranks.rank_log import open_rank_log
RANK = int(sys.argv[2])
def opened():
    return open_rank_log(Path(sys.argv[1]), RANK, 4)
"""


def run(directory: Path, rank: int, code: str, status: int = 0) -> tuple[str, str, str]:
    """Returns the log without its header, and the text on stdout and stderr, which are pipes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", OPEN + code, str(directory), str(rank)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == status, process.stderr
    log = (directory / f"rank-{rank:05d}.log").read_text()
    return log.partition("\n")[2], process.stdout, process.stderr


def test_the_header_counts_the_attempts(tmp_path: Path) -> None:
    directory = tmp_path / "out" / "logs"
    for _ in range(2):
        run(directory, 3, "assert opened() == Path(sys.argv[1], 'rank-00003.log')\nprint('hello')")
    lines = (directory / "rank-00003.log").read_text().splitlines()
    assert lines[1::2] == ["hello", "hello"]
    for attempt, header in enumerate(lines[::2], start=1):
        pattern = rf"=== attempt {attempt}, \d{{4}}-\d\d-\d\dT[\d:]{{8}}[+-][\d:]+, rank 3 of 4, host \S+, process \d+"
        assert re.fullmatch(pattern, header)


@pytest.mark.parametrize("rank", [0, 2])
def test_all_output_of_python_is_in_the_log(tmp_path: Path, rank: int) -> None:
    code = """
import logging, warnings
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())
print("before")
opened()
print("printed", "in", "pieces")
print("to stderr", file=sys.stderr)
early.warning("of a handler that was made before")
warnings.warn("careful")
sys.stdout.writelines(["a\\n", "b\\n"])
print("größer", "\\udc80", file=sys.stderr)
raise ValueError("the end")
"""
    log, out, err = run(tmp_path, rank, code, status=1)
    lines = log.splitlines()
    for line in ("printed in pieces", "to stderr", "of a handler that was made before", "a", "b", "größer \\udc80"):
        assert line in lines
    assert "UserWarning: careful" in log
    assert lines[-1] == "ValueError: the end"
    assert "before" not in lines
    if rank == 0:
        assert out == "before\nprinted in pieces\na\nb\n"
        assert err.splitlines()[-1] == "ValueError: the end"
    else:
        assert (out, err) == ("before\n", "")


def test_output_of_c_libraries_and_child_processes_is_in_the_log_of_other_ranks(tmp_path: Path) -> None:
    code = """
import ctypes, subprocess
opened()
print("first")
libc = ctypes.CDLL(None)
libc.puts(b"from C")
libc.fflush(None)
os.write(2, b"to the descriptor\\n")
subprocess.run(["sh", "-c", "echo from a child; echo and its errors >&2"])
print("last")
"""
    log, out, err = run(tmp_path, 1, code)
    assert log.splitlines() == ["first", "from C", "to the descriptor", "from a child", "and its errors", "last"]
    assert (out, err) == ("", "")


@pytest.mark.parametrize("rank", [0, 1])
def test_no_line_is_lost_by_os_exit(tmp_path: Path, rank: int) -> None:
    code = "opened()\nprint('said', end=' ')\nprint('at once')\nprint('and this', file=sys.stderr)\nos._exit(5)"
    log, *_ = run(tmp_path, rank, code, status=5)
    assert log == "said at once\nand this\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_writes_the_stack(tmp_path: Path, rank: int) -> None:
    code = "import ctypes\ndef the_culprit():\n    ctypes.string_at(0)\nopened()\nthe_culprit()"
    log, *_ = run(tmp_path, rank, code, status=-11)
    assert "Fatal Python error: Segmentation fault" in log
    assert "in the_culprit" in log


def test_a_console_that_is_gone_does_not_stop_rank_0(tmp_path: Path) -> None:
    """As after kill -9 of a launcher that reads the output of its ranks, such as mpirun."""
    code = """
opened()
print("before", flush=True)
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    print("after", file=stream, flush=True)
    os.write(stream.fileno(), b"from C\\n")
    print("last", file=stream)
sys.exit(3)
"""
    command = [sys.executable, "-c", OPEN + code, str(tmp_path), "0"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"before\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "rank-00000.log").read_text().splitlines()[1:] == ["before", *["after", "last"] * 2]


def test_progress_bars_are_not_in_the_log(tmp_path: Path) -> None:
    code = """
from tqdm import tqdm
opened()
outer = tqdm(total=3, mininterval=0)
for number in range(3):
    inner = tqdm(total=20, mininterval=0, leave=False)
    for _ in range(20):
        inner.update()
    tqdm.write(f"line {number}", file=sys.stderr)
    inner.close()
    outer.update()
outer.close()
print("done")
"""
    log, out, err = run(tmp_path, 0, code)
    assert log.replace("\x1b[A", "").splitlines() == ["line 0", "line 1", "line 2", "done"]
    assert err.count("20/20") >= 3
    assert out == "done\n"


def test_the_console_does_not_change(tmp_path: Path) -> None:
    code = """
before = [(s, s.isatty(), s.encoding, s.errors, s.fileno(), s.line_buffering) for s in (sys.stdout, sys.stderr)]
opened()
after = [(s, s.isatty(), s.encoding, s.errors, s.fileno(), s.line_buffering) for s in (sys.stdout, sys.stderr)]
assert before == after
print("%s" % sys.stdout.write("four"))
try:
    print(b"bytes", end=b"")
except TypeError:
    pass
"""
    log, out, _ = run(tmp_path, 0, code)
    assert log == out == "four4\n"


def test_the_log_does_not_import_torch(tmp_path: Path) -> None:
    run(tmp_path, 0, "opened()\nassert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()")


def test_a_full_disk_does_not_stop_the_rank(tmp_path: Path) -> None:
    code = """
import resource, signal
opened()
print("fits")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
print("does not fit")
"""
    log, out, _ = run(tmp_path, 0, code)
    assert (log, out) == ("fits\n", "fits\ndoes not fit\n")


def test_forked_processes_write_to_the_same_log(tmp_path: Path) -> None:
    code = "opened()\nif os.fork() == 0:\n    print('helper')\n    os._exit(0)\nos.wait()\nprint('rank')"
    for rank in (0, 1):
        assert run(tmp_path, rank, code)[0] == "helper\nrank\n"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(
        UserError, match=r"logs/rank-00000.log: cannot be written to \((File exists|Not a directory)\)"
    ):
        open_rank_log(tmp_path / "logs", 0, 1)


@pytest.mark.parametrize(
    ("text", "is_line_empty", "kept"),
    [
        ("words", True, "words"),
        ("words\n", False, "words\n"),
        ("\n", False, "\n"),
        ("\n", True, ""),  # moves to the bar below
        ("\x1b[A\x1b[A", True, ""),
        ("\x1b[A", False, "\x1b[A"),
        ("\r 50%|##  | 1/2", True, ""),
        ("\r 50%|##  | 1/2", False, ""),
        ("\r\n", False, "\r\n"),
        ("a\rb", True, "a\rb"),
    ],
)
def test_without_progress_bars(text: str, is_line_empty: bool, kept: str) -> None:
    assert without_progress_bars(text, is_line_empty) == kept
