"""Executes the runs of a comparison, one after another, each as `sparse-zero train` in a process of its own."""

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher import report
from launcher.comparison.directory import LOG_FILE, RESULTS_FILE, RUN_FILE, check_run, write_json
from launcher.comparison.variants import Comparison, Run
from sparse_zero.errors import UserError
from sparse_zero.ranks.stop_signals import STOPPED

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.2


class Ended(NamedTuple):
    """How a run ended."""

    run: Run
    results: dict[str, Any] | None
    """The content of its results.json; None if it failed."""
    problem: str | None = None


class Interrupted(Exception):
    """A signal has stopped the comparison, which can go on."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def command(comparison: Comparison, run: Run) -> list[str]:
    """The words of `sparse-zero` that a run consists of."""
    return ["train", comparison.path, *run.overrides]


def execute(comparison: Comparison, run: Run) -> Ended:
    """Run what is not done yet, and read its results. Raises Interrupted, and UserError: the run is going on."""
    results = run.directory / RESULTS_FILE
    check_run(run)
    if not results.exists():
        run.directory.mkdir(parents=True, exist_ok=True)
        write_json(run.directory / RUN_FILE, {"overrides": list(run.overrides)})
        log = run.directory / LOG_FILE
        status = _train([*command(comparison, run), "--resume"], log)
        if status != 0 or not results.exists():
            problem = problem_of(log.read_text(errors="replace"), status)
            # By a run that still goes on, see checkpoint.output_lock: the times of others would be wrong beside it
            if problem.startswith("training.output_dir: ") and " is in use by " in problem:
                raise UserError(problem)
            return Ended(run, None, problem)
    return Ended(run, json.loads(results.read_text()))


def _train(words: Sequence[str], log: Path) -> int:
    """Run `sparse-zero` in a process of its own, which gets this one's signals. Returns: its exit status."""
    with log.open("w") as output, _passed_on() as received:
        # -P: a module of the user's in the working directory must not replace one of ours
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_this_process,
        )
        sent = 0
        while (status := process.poll()) is None:
            for number in received[sent:]:
                process.send_signal(number)
            sent = len(received)
            time.sleep(_POLL_SECONDS)
    if status == STOPPED or received:
        raise Interrupted(status if status > 0 else STOPPED)
    return status


def _end_with_this_process() -> None:
    """On Linux: if this process is killed, the run is asked to save a checkpoint and to stop. In the child."""
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextlib.contextmanager
def _passed_on() -> Iterator[list[int]]:
    """In the block, signals are collected instead of ending this process."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def problem_of(printed: str, status: int) -> str:
    """Why a command failed, from what it printed."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    mark = f"{report.PROGRAM}: error: "
    errors = [line.partition(mark)[2] for line in lines if mark in line]
    return errors[-1] if errors else f"exit status {status}: {lines[-1] if lines else 'no output'}"


class Progress:
    """One bar for all runs on a terminal, else a line for each: how many are done, and the time that is left."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._done, self._clock = total, 0, clock
        self._seconds: dict[str, list[float]] = {}
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} runs{postfix}", leave=False)

    @contextlib.contextmanager
    def running(self, run: Run, remaining: Sequence[str]) -> Iterator[None]:
        """Show a run while it runs.

        Args: remaining: the variants of the runs that are left, this one included.
        """
        left = self.seconds_left(remaining)
        shown = f"{run.title}{'' if left is None else f', {_clock_time(left)} left'}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            print(f"{report.PROGRAM}: run {self._done + 1} of {self._total}: {shown}", file=sys.stderr, flush=True)
        begun, was_done = self._clock(), (run.directory / RESULTS_FILE).exists()
        yield
        if not was_done:
            self._seconds.setdefault(run.variant, []).append(self._clock() - begun)
        self.skip()

    def skip(self) -> None:
        """Count a run that is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def seconds_left(self, remaining: Sequence[str]) -> float | None:
        """By the mean time of the same variant's runs, or of all; None before the first run has ended."""
        every = [seconds for runs in self._seconds.values() for seconds in runs]
        if not every:
            return None
        means = {name: sum(runs) / len(runs) for name, runs in self._seconds.items()}
        return sum(means.get(name, sum(every) / len(every)) for name in remaining)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
