"""Slurm on the lab's hosts: slurmctld on the first, slurmd and munged on each, from Debian's packages."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import Host, Hosts
from on_host import Command, wait_until

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdSpoolDir={root}/slurm/spool.%n
StateSaveLocation={root}/slurm/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={silence_seconds}
KillWait=5
TmpFS=/run/tmp
JobRequeue=1
PropagateResourceLimits=NONE
NodeName={nodes} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# A requeued job waits for twice cred_expire, 121 s by default. config_overrides: the hosts' cores and memory are as
# written here, whatever the machine has.

RUNNING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING"}
"""The states of a job that has not ended."""

Job = dict[str, str]
"""What `scontrol show job` tells: JobState, ExitCode, Restarts, NodeList, StdOut, ..."""


class Slurm:
    """A controller and its nodes. It ends with its hosts."""

    def __init__(self, hosts: Hosts, names: Sequence[str], silence_seconds: int = 10) -> None:
        """Start it and wait until every node is idle.

        Args: names: its hosts, the controller first; silence_seconds: after which a node counts as down.
        """
        self.hosts, self.names, self.controller = hosts, list(names), hosts[names[0]]
        root = hosts.root
        self._etc = root / "etc" / "slurm"
        for directory in (self._etc, root / "slurm" / "state", *(root / "slurm" / f"spool.{name}" for name in names)):
            directory.mkdir(parents=True)
        (self._etc / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller=self.controller.name, root=root, silence_seconds=silence_seconds, nodes=",".join(names)
            )
        )
        key = root / "slurm" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for name in names:
            self._start_node(hosts[name])
            hosts[name].at_boot.append(self._start_node)
        hosts.healers.append(self.heal)
        self.wait_until_idle()

    def _start_node(self, host: Host) -> None:
        root = self.hosts.root
        munged = f"munged --key-file={root}/slurm/munge.key --log-file={root}/log/munged.{host.name}"
        lines = [
            "set -e",
            # This host alone sees it there.
            f"mount --bind {self._etc} /etc/slurm",
            "mkdir -p /run/munge",
            f"{munged} --seed-file=/run/munge/seed",
            *(["slurmctld"] if host is self.controller else []),
            "slurmd",
        ]
        host.run("sh", "-c", "\n".join(lines))

    def run(self, *words: object, status: int | None = 0, timeout: float = 60, **options: object) -> Command:
        """Run one of Slurm's commands, or any other, on the controller."""
        __tracebackhide__ = True
        return self.controller.run(*words, status=status, timeout=timeout, **options)

    def nodes(self) -> dict[str, str]:
        """The state of each node: idle, mixed, allocated, down, drained, ...; with a * it does not answer."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %T").output.splitlines())

    def wait_until_idle(self, timeout: float = 60) -> None:
        wait_until(
            lambda: set(self.nodes().values()) == {"idle"} and len(self.nodes()) == len(self.names),
            timeout,
            "all nodes of Slurm are idle",
        )

    def submit(self, *words: object, **options: object) -> int:
        """sbatch with these options and script. Args: options: of `run`. Returns: the job's number."""
        return int(self.run("sbatch", "--parsable", *words, **options).output.split()[-1])

    def job(self, number: int) -> Job:
        line = self.run("scontrol", "show", "job", number, "--oneliner").output
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def jobs(self) -> list[int]:
        """The jobs that have not ended."""
        return [int(number) for number in self.run("squeue", "-h", "-o", "%A").output.split()]

    def wait_for(self, number: int, is_so: Callable[[Job], bool], timeout: float, what: str) -> Job:
        """Wait until a job is as asked."""
        __tracebackhide__ = True
        seen: Job = {}

        def look() -> bool:
            seen.update(self.job(number))
            return is_so(seen)

        try:
            wait_until(look, timeout, f"job {number} {what}", every=0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {seen}\nits output:\n{self.output(number)}") from None
        return seen

    def wait(self, number: int, timeout: float = 60, state: str | None = "COMPLETED") -> Job:
        """Wait for a job's end. Raises AssertionError with its output where it ends in another state (None: any)."""
        __tracebackhide__ = True
        job = self.wait_for(number, lambda job: job["JobState"] not in RUNNING, timeout, "has ended")
        as_asked = state in (None, job["JobState"])
        assert as_asked, f"job {number} ended as {job['JobState']}: {job}\nits output:\n{self.output(number)}"
        return job

    def output(self, number: int) -> str:
        """What a job has printed so far."""
        file = Path(self.job(number).get("StdOut", ""))
        return file.read_text(errors="replace") if file.is_file() else ""

    def cancel(self, number: int, *options: object) -> None:
        self.run("scancel", *options, number)

    def heal(self) -> None:
        """End all jobs and take back the nodes that Slurm has given up. The hosts have to run and be connected."""
        for number in self.jobs():
            self.cancel(number)
        for name, state in self.nodes().items():
            if state.rstrip("*") in ("down", "drained", "draining", "fail", "error"):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", status=None)
        self.wait_until_idle()
