"""Commands that start ranks on the hosts of a hostfile: DeepSpeed's runner, mpirun, or torchrun over pdsh."""

import math
import os
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.ways import devices, private_environment
from launcher.ways.command import SAFE_PATH, Command, private_variables, wrapped
from launcher.ways.hostfile import Host, choose_hosts, read_hostfile
from launcher.ways.local import choose_port, deepspeed_runner, threads_per_rank
from sparse_zero.errors import UserError
from sparse_zero.ranks import private_files
from sparse_zero.recipe.launch import LaunchSection
from sparse_zero.recipe.names import is_variable

PDSH = ["pdsh", "-S", "-f", "1024", "-R", "ssh"]
_SPECIAL = r"""[\s%'"\\`$&;|<>()*?\[\]{}!#~^]"""
"""What a shell, or pdsh, would not pass on as it is."""
_NODE_RANK = "NUMBER-OF-THIS-HOST"
"""Placeholder of %n, which pdsh replaces with the host's position in -w, from 0."""


def hosts_of(launch: LaunchSection) -> list[Host]:
    """The hosts that a recipe runs on; `slots` is the number of ranks on each.

    Raises:
        UserError: see read_hostfile and choose_hosts; the hostfile has fewer hosts or slots than the recipe needs.
    """
    hosts = choose_hosts(read_hostfile(launch.hostfile), launch.include, launch.exclude)
    if launch.nodes != "auto":
        if len(hosts) < launch.nodes:
            raise UserError(f"launch.nodes: {launch.nodes} requested, but {launch.hostfile} lists {len(hosts)} hosts")
        hosts = hosts[: launch.nodes]
    if launch.processes_per_node == "auto":
        return hosts
    ranks = int(launch.processes_per_node)
    for host in hosts:
        if host.slots < ranks:
            raise UserError(
                f"launch.processes_per_node: {ranks} requested, but {host.name} has {host.slots} slots in "
                f"{launch.hostfile}"
            )
    return [Host(host.name, ranks, host.devices[:ranks] if host.devices else None) for host in hosts]


def remote_command(
    launch: LaunchSection,
    hosts: Sequence[Host],
    words: Sequence[str],
    directory: Path,
    use_cpu: bool = False,
    watch: str | None = None,
) -> Command:
    """The command that starts `python -m words[0] words[1:]` on every slot of `hosts`.

    Args:
        directory: for the launcher's files.

    Raises:
        UserError: the launcher cannot pass a word or a variable to the other hosts.
    """
    private = private_variables(launch, watch)
    variables = dict(SAFE_PATH)
    if use_cpu:
        # Without it, every process prints a warning that there is no GPU.
        variables["DS_ACCELERATOR"] = "cpu"
    if launch.launcher != "deepspeed" and "PYTHONPATH" in os.environ:
        # See _deepspeed for DeepSpeed's runner.
        variables["PYTHONPATH"] = os.environ["PYTHONPATH"]
    most = max(host.slots for host in hosts)
    if most > 1 and (use_cpu or not devices.count_accelerators()):
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or threads_per_rank(most)
    variables = {name: value for name, value in variables.items() if name not in private}
    build = {"deepspeed": _deepspeed, "mpi": _mpirun, "torchrun": _torchrun}[launch.launcher]
    command = build(launch, hosts, list(words), directory, variables, private)
    return replace(command, world_size=sum(host.slots for host in hosts))


def _deepspeed(
    launch: LaunchSection,
    hosts: Sequence[Host],
    words: list[str],
    directory: Path,
    variables: dict[str, str],
    private: dict[str, str],
) -> Command:
    chosen = [f"{host.name}:{','.join(map(str, host.devices))}" if host.devices else host.name for host in hosts]
    slots = [f"{host.name} slots={max(host.devices) + 1 if host.devices else host.slots}\n" for host in hosts]
    if launch.multinode == "openmpi" and any(host.devices for host in hosts):
        raise UserError("launch.include: DeepSpeed's runner chooses no devices with openmpi; choose multinode: pdsh")
    by_pdsh = launch.multinode == "pdsh"
    if by_pdsh:
        _check_directories()
    # The runner would put the working directory into PYTHONPATH.
    variables = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} | variables
    # The runner itself writes the values of these into command lines.
    forwarded = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW")}
    own = {name: value for name, value in _own_variables().items() if name not in variables or name == "PYTHONPATH"}
    private = forwarded | own | private
    file = private_files.own_file(directory, private_environment.NAME) if private else None
    carried = {name: value for name, value in variables.items() if name not in private}
    lines = [f"{name}={_carried(name, value, by_pdsh)}" for name, value in carried.items()]
    if file and by_pdsh:
        lines += [f"{name}={word}".replace("%", "%%") for name, word in _references(file, private).items()]
    argv = [
        *deepspeed_runner(),
        *("--hostfile", str(directory / "hostfile")),
        *(["--include", "@".join(chosen)] if any(host.devices for host in hosts) else []),
        *("--launcher", launch.multinode),
        *([f"--launcher_args={shlex.join(launch.launcher_args)}"] if launch.launcher_args else []),
        *("--master_addr", _master(launch, hosts), "--master_port", str(choose_port(launch))),
        # The runner treats a single host as this machine, whatever its name.
        "--force_multi",
        *("--log_level", "critical"),
        *(["--module", *map(_for_pdsh, words)] if by_pdsh else _program_for_openmpi(words, file)),
    ]
    files = {
        str(directory / "hostfile"): "".join(slots),
        str(directory / "deepspeed_env"): "".join(f"{line}\n" for line in lines),
    }
    environment = dict.fromkeys(forwarded) | {"DS_ENV_FILE": str((directory / "deepspeed_env").absolute())}
    return Command(argv, environment, files, private=private, private_file=file)


def _references(file: Path, private: dict[str, str]) -> dict[str, str]:
    """Lines of DeepSpeed's environment file that make each host's shell read the values from `file`.

    The runner writes each line as `export NAME="TEXT"; ` before the command.
    """
    for name, value in private.items():
        if value.endswith("\n"):
            raise UserError(
                f"launch.environment: {name} ends with a line break, which DeepSpeed's runner cannot pass on"
            )
    # A shell ignores the status of what it replaces, so the first line ends it.
    first = {"SPARSE_ZERO_ENVIRONMENT": f"$({private_environment.check(file, 'kill $$')})"}
    return first | {name: private_environment.reference(file, name) for name in private}


def _program_for_openmpi(words: Sequence[str], file: Path | None) -> list[str]:
    """The end of the runner's command line. mpirun would get variables from the runner as words."""
    if file is None:
        return ["--module", *words]
    script = f'{private_environment.read(file)} && exec "$@"'
    return ["--no_python", "sh", "-c", script, "sh", sys.executable, "-u", "-m", *words]


def _mpirun(
    launch: LaunchSection,
    hosts: Sequence[Host],
    words: list[str],
    directory: Path,
    variables: dict[str, str],
    private: dict[str, str],
) -> Command:
    # Without them the ranks would need mpi4py to agree on an address.
    variables = variables | {"MASTER_ADDR": _master(launch, hosts), "MASTER_PORT": str(choose_port(launch))}
    private = {name: value for name, value in private.items() if name not in variables}
    argv = [
        *("mpirun", "--quiet", "-np", str(sum(host.slots for host in hosts))),
        *("--hostfile", str(directory / "hostfile")),
        # By default all threads of a rank share one core.
        *("--bind-to", "none"),
        *(word for name in (*variables, *private) for word in ("-x", name)),
        *launch.launcher_args,
        *wrapped([sys.executable, "-u", "-m", *words], launch),
    ]
    slots = "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
    return Command(argv, dict(variables), {str(directory / "hostfile"): slots}, private=private)


def _torchrun(
    launch: LaunchSection,
    hosts: Sequence[Host],
    words: list[str],
    directory: Path,
    variables: dict[str, str],
    private: dict[str, str],
) -> Command:
    if len({host.slots for host in hosts}) > 1:
        raise UserError(
            f"{launch.hostfile}: torchrun starts the same number of ranks on each host; give all hosts the same "
            "slots, or set launch.processes_per_node"
        )
    agent = [
        *(sys.executable, "-m", "launcher.ways.torchrun", "--nnodes", str(len(hosts))),
        *("--node-rank", _NODE_RANK, "--nproc-per-node", str(hosts[0].slots)),
        *("--master-addr", _master(launch, hosts), "--master-port", str(choose_port(launch))),
        *("--rdzv-id", uuid.uuid4().hex[:8]),
        # By default the agents wait 15 minutes for each other, even if pdsh has exited.
        *("--rdzv-conf", f"timeout={math.ceil(launch.rendezvous_seconds)}"),
        *launch.launcher_args,
        "-m",
        *words,
    ]
    remote = ["env", *(f"{name}={value}" for name, value in variables.items()), *wrapped(agent, launch)]
    file = private_files.own_file(directory, private_environment.NAME) if private else None
    steps = [f"cd {shlex.quote(os.getcwd())}", *([private_environment.read(file)] if file else [])]
    line = " && ".join([*steps, f"exec {shlex.join(remote)}"])
    line = line.replace("%", "%%").replace(_NODE_RANK, "%n")
    return Command([*PDSH, "-w", ",".join(host.name for host in hosts), line], private=private, private_file=file)


def _check_directories() -> None:
    """Raises UserError: DeepSpeed's runner, which does not quote them, would pass other directories to the hosts."""
    for what, path in (("the working directory", os.getcwd()), ("the directory of Python", sys.executable)):
        if re.search(_SPECIAL, path):
            raise UserError(
                f"{path!r}: DeepSpeed's runner cannot pass {what} to other hosts, because its name has a space or "
                "another special character; rename it, or choose launch.launcher=torchrun or mpi"
            )


def _carried(name: str, value: str, by_pdsh: bool) -> str:
    """A value as DeepSpeed's runner has to read it from its environment file, for the other hosts.

    Raises:
        UserError: the runner would pass another value.
    """
    # With openmpi, which uses no shell, the runner's quotes would become a part of the value.
    cannot = r'["\\`$\n\r\0]' if by_pdsh else r"[^\w@%+=:,./-]"
    if re.search(cannot, value) or value != value.strip():
        raise UserError(f"{name}={value!r}: DeepSpeed's runner cannot pass it to other hosts")
    return value.replace("%", "%%") if by_pdsh else value


def _master(launch: LaunchSection, hosts: Sequence[Host]) -> str:
    return launch.master_addr or hosts[0].name


def _for_pdsh(word: str) -> str:
    """Quote a word for the shell of the other host: DeepSpeed's runner does not."""
    if re.search(r"[\s%'\"]", word):
        raise UserError(
            f"'{word}': DeepSpeed's runner cannot pass spaces, quotes and % to other hosts; write it into the recipe"
        )
    return shlex.quote(word)


def _own_variables() -> dict[str, str]:
    """The variables that the user's .deepspeed_env, or DS_ENV_FILE, sets.

    The runner gets them in a file of ours: it fails on blank lines, and a comment comments out the remote command.
    """
    variables = {}
    for directory in (Path.home(), Path.cwd()):
        file = directory / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for line in file.read_text().splitlines() if file.is_file() else []:
            name, equals, value = line.partition("=")
            if equals and not name.lstrip().startswith("#"):
                variables[name.strip()] = value.strip()
    for name in variables:
        if not is_variable(name):
            raise UserError(f".deepspeed_env: {name!r} cannot be a variable: use letters, digits and _")
    return variables
