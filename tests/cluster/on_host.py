"""A command on one of the lab's hosts, and its end."""

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

Answer = TypeVar("Answer")


def wait_until(ask: Callable[[], Answer], timeout: float, what: str, every: float = 0.05) -> Answer:
    """What `ask` answers as soon as that is true. Raises AssertionError, which names `what`, after `timeout` s."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(every)
    return answer


class Command:
    """A command that runs, or has run, on a host, in a session of its own and without standard input."""

    def __init__(
        self, host: str, init: int, words: Sequence[object], cwd: Path, environment: Mapping[str, str], log: Path
    ) -> None:
        """Args: init: the host's first process; log: a new file, for what the command and its children print."""
        self.host, self.words, self.log = host, [str(word) for word in words], log
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid"]
        # Where pytest runs in a shell's background SIGINT is ignored, and its children would inherit that.
        clean = ["env", f"--chdir={cwd}", "--default-signal=INT,QUIT"]
        self._started = time.monotonic()
        # A file and not a pipe: a process that outlives the command would hold the pipe open.
        with log.open("wb") as output:
            self._outside = subprocess.Popen(
                ["nsenter", f"--target={init}", *namespaces, *clean, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
            )

    def __str__(self) -> str:
        return f"{self.host}$ {shlex.join(self.words)}"

    @property
    def output(self) -> str:
        """What has been printed so far, stdout and stderr in one."""
        return self.log.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """The exit status, -n for signal n; None while it runs."""
        return self._outside.poll()

    @property
    def process(self) -> psutil.Process:
        """The command itself, by its number outside of the host: for signals, and for its children."""
        return wait_until(psutil.Process(self._outside.pid).children, 5, f"{self} has started")[0]

    def wait(self, timeout: float = 60, status: int | None = 0) -> "Command":
        """Wait for the end. Raises AssertionError with all that was printed where it does not come, or another status.

        Args: status: None for any.
        """
        __tracebackhide__ = True
        try:
            self._outside.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self}\nhad not ended after {timeout:g} s; it printed\n{self.output}") from None
        ended_as_asked = status is None or self.status == status
        assert ended_as_asked, f"{self}\nended with status {self.status}; it printed\n{self.output}"
        return self

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait until the output matches. Raises AssertionError where it ends, or `timeout` s pass, without."""
        __tracebackhide__ = True

        def look() -> re.Match[str] | None:
            ended = self.status is not None
            match = re.search(pattern, self.output, re.MULTILINE)
            assert match or not ended, f"{self}\nended ({self.status}) without {pattern!r}; it printed\n{self.output}"
            return match

        try:
            return wait_until(look, timeout, f"{self}: {pattern!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}\nit printed\n{self.output}") from None

    def end(self) -> None:
        """Kill the command and its descendants. What they started elsewhere, or left to init, is not theirs."""
        try:
            started = psutil.Process(self._outside.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            started = []
        for process in started:
            process.kill()
        self._outside.wait()
