"""A process that imports everything once and then forks ranks for many short runs: `python fork_server.py`.

A request is a line of standard input, {"jobs": FILE, "ends": FILE}; "done" on standard output answers it. The first
file maps each job's name to its launches, which run one after the other: {"count": ranks, "call": "module:function",
"arguments": [...]}. Every rank calls the function in its own process, over gloo, and exits with what it returns. The
second file gets how each launch ended. Jobs run at the same time, up to RANKS_AT_ONCE ranks: those of one request
must not depend on each other. No rank is ended because
another one failed: that ranks end by themselves is what the tests look at.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LAUNCH_SECONDS, ENDING_SECONDS = 240.0, 90.0
"""How long a launch may take, and how long its ranks may take to end after one of them has failed."""
RANKS_AT_ONCE = 4

Spec = dict[str, Any]


IMPORTS = (
    "sparse_zero.training.run",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # uses torch.compile, which imports the compiler
)
"""Modules that ranks otherwise import during a run."""


def import_everything() -> None:
    """What would otherwise cost every rank several seconds: imports, the loading of operators, tables."""
    for module in IMPORTS:
        importlib.import_module(module)
    from deepspeed.comm.torch import build_shm_op
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from sparse_zero.gradient import cpu
    from sparse_zero.ranks.extension_locks import remove_abandoned_locks

    get_checkpoint_conversion_mapping("llama")
    remove_abandoned_locks()
    cpu.load_operator()
    build_shm_op()


class Launch:
    """The ranks of one launch, from their start to their end."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.count, self.log = spec["count"], log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._statuses: dict[int, int] = {}
        self._first_failure: float | None = None
        self.pids: dict[int, int] = {}
        """Those that have not ended, with their ranks."""
        self._group = 0
        """The process group of all ranks: the pid of the first one."""
        for rank in range(self.count):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, port, self._group, spec, log)
            self._group = self._group or pid
            with contextlib.suppress(ProcessLookupError):
                os.setpgid(pid, self._group)
            self.pids[pid] = rank
        self._started = time.monotonic()

    def rank_ended(self, pid: int, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        self._statuses[self.pids.pop(pid)] = code
        if code != 0 and self._first_failure is None:
            self._first_failure = time.monotonic()

    @property
    def hangs(self) -> bool:
        if self._first_failure is not None:
            return time.monotonic() - self._first_failure > ENDING_SECONDS
        return time.monotonic() - self._started > LAUNCH_SECONDS

    def kill(self) -> None:
        """Kill the ranks that are left, and whatever the ranks have started, such as the workers of a data loader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)

    def end(self) -> dict[str, Any]:
        """Exit statuses by rank (-n for signal n), and the seconds between the first bad end and the last end."""
        now = time.monotonic()
        end = {"seconds": now - self._started, "log": self.log.read_text()[-20000:]}
        if self.pids:
            return end | {"hanging": sorted(self.pids.values()), "statuses": self._statuses}
        ending = now - self._first_failure if self._first_failure else 0.0
        return end | {"statuses": [self._statuses[rank] for rank in range(self.count)], "ending_seconds": ending}


def _be_rank(rank: int, port: int, group: int, spec: Spec, log: Path) -> None:
    status = 1
    try:
        os.setpgid(0, group)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        count = str(spec["count"])
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=count,
            LOCAL_WORLD_SIZE=count,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        status = _function(spec)(*spec["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _function(spec: Spec) -> Any:
    module, _, function = spec["call"].partition(":")
    return getattr(importlib.import_module(module), function)


def run(jobs: dict[str, list[Spec]], logs: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns: how each launch of each job ended."""
    for specs in jobs.values():
        for spec in specs:
            _function(spec)  # import it before any rank is forked
    if "offload" in json.dumps(jobs):
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load()  # takes more than a minute to compile, longer than a rank may be silent
    gc.collect()
    gc.freeze()  # a rank's collections pass over what is already here
    ends: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    waiting, running = list(jobs), dict[str, Launch]()

    def start(name: str) -> None:
        number = len(ends[name])
        running[name] = Launch(jobs[name][number], logs / f"{name}-{number}.log")

    try:
        while waiting or running:
            at_work = sum(launch.count for launch in running.values())
            if waiting and (not running or at_work + jobs[waiting[0]][0]["count"] <= RANKS_AT_ONCE):
                start(waiting.pop(0))
                continue
            _collect_one_end(running)
            for name, launch in list(running.items()):
                if not launch.pids or launch.hangs:
                    ends[name].append(launch.end())
                    launch.kill()
                    del running[name]
                    if len(ends[name]) < len(jobs[name]):
                        start(name)
    finally:
        for launch in running.values():
            launch.kill()
    return ends


def _collect_one_end(running: dict[str, Launch]) -> None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pid = 0
    for launch in running.values():
        if pid in launch.pids:
            launch.rank_ended(pid, status)
    if not pid:
        time.sleep(0.01)


def main() -> None:
    # Ranks do not inherit it, so that the tests see its end when this process ends.
    answers = os.fdopen(os.dup(1), "w")
    os.register_at_fork(after_in_child=lambda: os.close(answers.fileno()))
    os.dup2(2, 1)  # what libraries print is no answer
    gc.disable()
    import_everything()
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        ends = Path(request["ends"])
        logs = ends.with_suffix("")
        logs.mkdir(exist_ok=True)
        ends.write_text(json.dumps(run(json.loads(Path(request["jobs"]).read_text()), logs), indent=1))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
