"""Hosts on one machine: each with its own processes, name, address, /run, /dev/shm and sshd, and a cable to a switch.

A host is a set of namespaces (pid, net, uts, ipc, mount) that its first process holds, and the switch a bridge in a
net namespace of its own. Files are shared: a path names the same file on every host, but for /run and /dev/shm.
Nothing of it has a name outside, so labs do not meet, and it ends with the process that made it, even a killed one.
"""

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from on_host import Command

INIT = Path(__file__).with_name("init.sh")
NETWORK = "10.77.0"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = {
    "hosts": {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "sshd": "openssh-server"},
    "slurm": {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge"},
    "pdsh": {"pdsh": "pdsh"},
    "mpi": {"mpirun": "openmpi-bin"},
}
"""What each part of the lab runs, and the Debian package that has it."""

SERVICES = {"munged", "slurmctld", "slurmscriptd", "slurmd"}

SSH_CONFIG = """\
Host *
  IdentityFile {root}/etc/id
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """\
HostKey {root}/etc/host_key
AuthorizedKeysFile {root}/etc/id.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile /run/sshd.pid
PrintMotd no
PrintLastLog no
MaxStartups 100
SetEnv {environment}
"""


def need(part: str) -> None:
    """Skip the test if this machine lacks a part of PROGRAMS; in CI it then fails, see tests/conftest.py."""
    if reason := missing(part):
        pytest.skip(reason)


def missing(part: str) -> str | None:
    """What this machine lacks for a part of PROGRAMS and how to come by it, as one line; None: nothing."""
    lacking = {name: package for name, package in PROGRAMS[part].items() if not shutil.which(name, path=SYSTEM_PATH)}
    if lacking:
        packages = " ".join(dict.fromkeys(lacking.values()))
        return f"no {', '.join(lacking)} here; apt-get install --no-install-recommends {packages}"
    if part == "mpi" and importlib.util.find_spec("mpi4py") is None:
        return "no mpi4py here; pip install '.[test]'"
    if os.geteuid() != 0:
        return "the test cluster's hosts are namespaces, which need root; run the tests as root"
    attempt = ["unshare", "--pid", "--net", "--uts", "--ipc", "--mount", "--fork", "mount", "-t", "tmpfs", "-", "/run"]
    tried = subprocess.run(attempt, capture_output=True, text=True)
    if tried.returncode:
        return f"no namespaces here ({tried.stderr.strip()}); give the container CAP_SYS_ADMIN and CAP_NET_ADMIN"
    return None


class Hosts(Mapping[str, "Host"]):
    """A switch and the hosts on it, by name."""

    def __init__(self, root: Path, names: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start them. `close` ends them.

        Args: root: an empty directory for configuration and logs; environment: what every process on every host has,
            besides PATH, HOME (a directory that the hosts share), TMPDIR (a host's own) and LANG.
        """
        self.root = root
        self.environment = {
            "PATH": SYSTEM_PATH,
            "HOME": str(root / "home"),
            "TMPDIR": "/run/tmp",
            "LANG": "C.UTF-8",
            **(environment or {}),
        }
        self.healers: list[Callable[[], None]] = []
        """What heals the services on the hosts, once every host runs."""
        self.log_numbers = itertools.count(1)
        self._namespaces: set[str] = set()
        self._hosts = {name: Host(self, name, number) for number, name in enumerate(names, 1)}
        self._write_files()
        self._switch = _start(
            ["unshare", "--net", "sh", "-c", "ip link add br0 type bridge forward_delay 0 && echo ready && read _"],
            root / "log" / "switch",
        )
        try:
            _expect(self._switch, "ready", root / "log" / "switch")
            self.remember(self._switch.pid, "net")
            self.switch("link set br0 up")
            for host in self.values():
                host.power_on()
            for host in self.values():
                host.finish_boot()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> "Host":
        return self._hosts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def close(self) -> None:
        """End everything. Raises AssertionError where something is left."""
        for host in self.values():
            host.end()
        _end(self._switch)
        left = self.left_over()
        assert not left, f"left of the lab in {self.root}: {left}"

    def heal(self) -> None:
        """Every host runs and is connected again, and the services are as at the start."""
        for host in self.values():
            if not host.is_up:
                host.boot()
            host.plug()
        for heal in self.healers:
            heal()

    def strays(self) -> dict[psutil.Process, str]:
        """All processes but the hosts' own services, with the names of their hosts."""
        return {process: host.name for host in self.values() for process in host.strays()}

    def end_strays(self, grace_seconds: float = 3) -> list[str]:
        """Kill the strays. Returns: what had not ended by itself in `grace_seconds`."""
        strays = self.strays()
        _, left = psutil.wait_procs(strays, timeout=grace_seconds)
        lines = []
        for _ in range(20):
            if not left:
                break
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    lines.append(f"{strays[process]}: {' '.join(process.cmdline())}")
                    process.kill()
            psutil.wait_procs(left, timeout=grace_seconds)
            # What they had started in the meantime
            left = list(strays := self.strays())
        return lines

    def left_over(self) -> list[str]:
        """Processes in any namespace that a host or the switch ever had, and mounts of its files outside of them."""
        processes = [
            f"process {process.pid} {process.name()}"
            for kind in ("pid", "net")
            for process in _processes_in(self._namespaces, kind)
        ]
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.root) in line]
        return processes + mounts

    def remember(self, pid: int, *kinds: str) -> None:
        """Namespaces that left_over shall look at."""
        self._namespaces |= {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds}

    def switch(self, command: str) -> None:
        """Run an `ip` command on the switch."""
        inside = ["nsenter", f"--target={self._switch.pid}", "--net", "ip", *command.split()]
        done = subprocess.run(inside, capture_output=True, text=True)
        assert done.returncode == 0, f"switch: ip {command}: {done.stderr}"

    def _write_files(self) -> None:
        etc = self.root / "etc"
        for directory in (etc, self.root / "log", self.root / "home"):
            directory.mkdir()
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self.values())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        # Nobody listens there, so that an unknown name or address is refused at once.
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        (etc / "ssh_config").write_text(SSH_CONFIG.format(root=self.root))
        environment = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        (etc / "sshd_config").write_text(SSHD_CONFIG.format(root=self.root, environment=environment))
        for name in ("host_key", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / name)], check=True)


class Host:
    """One host. It can be killed and booted again, keeps its address then, and its cable can be pulled."""

    def __init__(self, lab: Hosts, name: str, number: int) -> None:
        self.lab, self.name, self.address = lab, name, f"{NETWORK}.{number}"
        self.at_boot: list[Callable[[Host], None]] = []
        """Starts the host's services, at every boot."""
        self._port, self._hardware_address = f"p{number}", f"02:77:00:00:00:{number:02x}"
        self._console = lab.root / "log" / f"console.{name}"
        self._outside: subprocess.Popen[str] | None = None
        self._init: psutil.Process | None = None
        self._commands: list[Command] = []

    @property
    def is_up(self) -> bool:
        return self._outside is not None and self._outside.poll() is None

    def boot(self) -> None:
        self.power_on()
        self.finish_boot()

    def power_on(self) -> None:
        """The first half of a boot, so that hosts can boot at the same time."""
        alone = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net", "--uts", "--ipc", "--mount"]
        init = ["bash", str(INIT), str(self.lab.root), self.name, self.address]
        self._outside = _start([*alone, *init], self._console)

    def finish_boot(self) -> None:
        _expect(self._outside, "ready", self._console)
        [self._init] = psutil.Process(self._outside.pid).children()
        self.lab.remember(self._init.pid, "pid", "net")
        # The same address of the network card at every boot: the others' ARP tables remember it.
        cable = f"type veth peer name eth0 address {self._hardware_address} netns {self._init.pid}"
        with contextlib.suppress(AssertionError):  # the kernel takes its time to remove that of the last boot
            self.lab.switch(f"link del {self._port}")
        self.lab.switch(f"link add {self._port} {cable}")
        self.lab.switch(f"link set {self._port} master br0 up")
        self._outside.stdin.write("go\n")
        self._outside.stdin.flush()
        _expect(self._outside, "up", self._console)
        for start_services in self.at_boot:
            start_services(self)

    def kill(self) -> None:
        """Power off: nothing gets out on the network any more, then every process is gone."""
        self.unplug()
        self.end()

    def end(self) -> None:
        """End every process, as at the lab's end."""
        if self._outside is None:
            return
        if self._init is not None:
            self._init.kill()
        _end(self._outside)
        for command in self._commands:
            command.end()
        self._init, self._outside, self._commands = None, None, []

    def unplug(self) -> None:
        """Pull the cable."""
        self.lab.switch(f"link set {self._port} down")

    def plug(self) -> None:
        self.lab.switch(f"link set {self._port} up")

    def start(self, *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Command:
        """Start a command. Args: cwd: HOME by default; env: over the lab's environment."""
        assert self.is_up, f"{self.name} is off"
        environment = {**self.lab.environment, **(env or {})}
        log = self.lab.root / "log" / f"{next(self.lab.log_numbers):03}.{self.name}.{Path(str(words[0])).name}"
        command = Command(self.name, self._init.pid, words, cwd or Path(environment["HOME"]), environment, log)
        self._commands.append(command)
        return command

    def run(
        self,
        *words: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        status: int | None = 0,
    ) -> Command:
        """Run a command to its end, see Command.wait."""
        __tracebackhide__ = True
        return self.start(*words, cwd=cwd, env=env).wait(timeout, status)

    def processes(self, *words: str) -> list[psutil.Process]:
        """This host's processes, but the first, whose command lines contain all of these."""
        if not self.is_up:
            return []
        found = []
        for process in _processes_in({os.readlink(f"/proc/{self._init.pid}/ns/pid")}, "pid"):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if process != self._init and line and all(word in line for word in words):
                    found.append(process)
        return found

    def strays(self) -> list[psutil.Process]:
        """The processes that are none of the host's services, nor sshd's sessions that run nothing any more: one whose
        client's host is gone learns of it after hours.
        """
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                name = process.name()
                is_idle = name == "sshd" and not process.children()
                if name not in SERVICES and not is_idle and not (name == "sshd" and process.ppid() == self._init.pid):
                    found.append(process)
        return found


def _start(command: list[str], console: Path) -> subprocess.Popen[str]:
    """Start what holds a namespace, and ends with its standard input."""
    with console.open("ab") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={"PATH": SYSTEM_PATH},
        )


def _expect(process: subprocess.Popen[str], line: str, console: Path) -> None:
    said = process.stdout.readline().strip()
    assert said == line, f"{' '.join(process.args)}: {said!r}, not {line!r}; {console.read_text()}"


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    process.wait()


def _processes_in(namespaces: set[str], kind: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.readlink(f"/proc/{process.pid}/ns/{kind}") in namespaces:
                yield process
