"""Many short runs of several ranks in one process that has imported everything: ranks are forked, not started.

    python farm.py JOBS.json OUT.json

A job is a list of launches, one after the other, of {"count": ranks, "call": "module:function", "arguments": [...]};
every rank calls the function in a process of its own, over gloo, and its return value is its exit status. Nobody ends
the other ranks when one fails: that they end by themselves is what the tests look at.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HANG_SECONDS = 90.0


def launch(count: int, call: str, arguments: list[Any], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Returns: exit statuses by rank (-n for signal n), and the seconds between the first bad end and the last end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        group = min(pids, key=pids.get, default=pid)  # that of the first rank
        if pid == 0:
            _be_rank(rank, count, port, group, call, arguments, log, environment)
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, group)
        pids[pid] = rank
    statuses: dict[int, int] = {}
    first_failure = None
    started = time.monotonic()
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if pid and pid not in pids:
            continue  # what a library has started, such as a compiler
        if pid:
            code = os.waitstatus_to_exitcode(status)
            statuses[pids.pop(pid)] = code
            if code != 0 and first_failure is None:
                first_failure = now
        elif now - (first_failure or started) > HANG_SECONDS:
            for hanging in pids:
                os.kill(hanging, signal.SIGKILL)
            hanging = sorted(pids.values())
            return {"statuses": statuses, "hanging": hanging, "seconds": now - started, "log": log.read_text()[-4000:]}
        else:
            time.sleep(0.01)
    ending = time.monotonic() - first_failure if first_failure else 0.0
    return {
        "statuses": [statuses[rank] for rank in range(count)],
        "ending_seconds": ending,
        "seconds": time.monotonic() - started,
        "log": log.read_text()[-20000:],
    }


def _be_rank(
    rank: int,
    count: int,
    port: int,
    group: int,
    call: str,
    arguments: list[Any],
    log: Path,
    environment: dict[str, str],
) -> None:
    status = 1
    try:
        os.setpgid(0, group)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **environment,
        )
        module, function = call.split(":")
        status = getattr(importlib.import_module(module), function)(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main(jobs: str, out: str) -> None:
    import deepspeed  # noqa: F401

    from sparse_zero.gradient import cpu
    from sparse_zero.ranks.extension_locks import remove_abandoned_locks

    cpu.load_operator()  # built before anything is timed
    if "offload" in Path(jobs).read_text():
        # Takes a minute or two where it has not been built: more than a rank may be silent.
        build = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
        subprocess.run([sys.executable, "-c", build], check=True)
    logs = Path(out).with_suffix("")
    logs.mkdir(exist_ok=True)
    done = {}
    for name, launches in json.loads(Path(jobs).read_text()).items():
        done[name] = []
        for number, each in enumerate(launches):
            log = logs / f"{name}-{number}.log"
            environment = each.get("environment", {})
            remove_abandoned_locks()
            done[name].append(launch(each["count"], each["call"], each["arguments"], log, environment))
            Path(out).write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
