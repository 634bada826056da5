"""What lies about on the machine that starts a run: files and variables that change it unseen, programs it needs."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.findings import Finding, error, ok, warning
from sparse_zero.launch_config import LaunchSection


def traps(
    environment: Mapping[str, str], home: Path, root: Path = Path("/"), runs_pdsh: bool = False
) -> Iterator[Finding]:
    """Files and variables that DeepSpeed's runner and pdsh obey without saying so.

    Args: runs_pdsh: whether this run is started by them.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for file in dict.fromkeys((home / name, Path(name).absolute())):
        if file.is_file():
            yield from _deepspeed_environment(file, runs_pdsh)
    hostfile = root / "job" / "hostfile"
    if hostfile.is_file():
        cure = "remove it, or always give deepspeed --hostfile; `sparse-zero train` reads launch.hostfile only"
        yield warning("surroundings", f"{hostfile}: a `deepspeed` by hand sends its ranks to the hosts in it", cure)
    kind = environment.get("PDSH_RCMD_TYPE", "ssh")
    if kind != "ssh":
        cure = "unset PDSH_RCMD_TYPE"
        yield warning("surroundings", f"PDSH_RCMD_TYPE={kind}: pdsh by hand takes it, DeepSpeed's runner ssh", cure)


def _deepspeed_environment(file: Path, runs_pdsh: bool) -> Iterator[Finding]:
    say, good = (error if runs_pdsh else warning), True
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        key, equals, _ = line.partition("=")
        if not equals:
            what = "is blank" if not line.strip() else "has no ="
            consequence = "DeepSpeed's runner ends with a ValueError where there are several hosts"
        elif key.strip().startswith("#"):
            what = "is a comment with a ="
            consequence = "it comments out the whole remote command, which then ends with status 0"
        else:
            continue
        good = False
        yield say("surroundings", f"{file}: line {number} {what}: {consequence}", "keep NAME=VALUE lines only")
    if good:
        yield ok("surroundings", f"{file} sets variables on every host")


def programs(launch: LaunchSection, several_hosts: bool) -> Iterator[Finding]:
    """The programs that start the ranks of other hosts."""
    if not several_hosts or launch.launcher == "slurm":
        return
    needed = {"ssh": "openssh-client"}
    if launch.launcher == "mpi" or (launch.launcher == "deepspeed" and launch.multinode == "openmpi"):
        needed["mpirun"] = "openmpi-bin"
    elif launch.launcher == "deepspeed":
        needed["pdsh"] = "pdsh"
    missing = [name for name in needed if shutil.which(name) is None]
    for name in missing:
        other = " or choose launch.launcher=torchrun" if name != "ssh" else ""
        cure = f"install it (apt-get install {needed[name]}){other and ',' + other}"
        yield error("launcher", f"{name}, which launch.launcher={launch.launcher} needs, is not there", cure)
    if "pdsh" in needed and "pdsh" not in missing and "ssh" not in pdsh_modules():
        cure = "install a pdsh with it (apt-get install pdsh; pdsh-rcmd-ssh elsewhere)"
        yield error("launcher", "pdsh has no ssh module, which DeepSpeed's runner asks for", cure)
    elif not missing:
        yield ok("launcher", f"{' and '.join(needed)} {'are' if len(needed) > 1 else 'is'} there")


def pdsh_modules() -> list[str]:
    """The ways in which this pdsh can reach a host."""
    said = subprocess.run(["pdsh", "-V"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    modules = next((line.partition(":")[2] for line in said.splitlines() if line.startswith("rcmd modules")), "")
    return modules.partition("(")[0].strip().split(",")


def this_machines_traps(runs_pdsh: bool) -> Iterator[Finding]:
    """`traps` of the real surroundings."""
    return traps(os.environ, Path.home(), runs_pdsh=runs_pdsh)
