"""What lies about on the machine that starts a run: files and variables that change it unseen, programs it needs."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.ways import launchers
from sparse_zero.recipe.launch import LaunchSection

PACKAGES = {"ssh": "openssh-client", "pdsh": "pdsh", "mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"}
"""Debian's, with the programs that start ranks on other hosts."""


def traps(environment: Mapping[str, str], home: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """What DeepSpeed's runner and pdsh obey without saying so. `sparse-zero train` sees to it that its own runs do
    not; they are there for a `deepspeed` by hand.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for file in dict.fromkeys((home / name, Path(name).absolute())):
        if file.is_file():
            yield from _deepspeed_environment(file)
    hostfile = root / "job" / "hostfile"
    if hostfile.is_file():
        cure = "remove it, or always give deepspeed --hostfile; `sparse-zero train` reads launch.hostfile only"
        yield warning("surroundings", f"{hostfile}: a `deepspeed` by hand sends its ranks to the hosts in it", cure)
    kind = environment.get("PDSH_RCMD_TYPE", "ssh")
    if kind != "ssh":
        message = f"PDSH_RCMD_TYPE={kind}: a pdsh by hand takes that way to the hosts, a run always ssh"
        yield warning("surroundings", message, "unset PDSH_RCMD_TYPE")


def _deepspeed_environment(file: Path) -> Iterator[Finding]:
    good = True
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        key, equals, _ = line.partition("=")
        if not equals:
            what = "is blank" if not line.strip() else "has no ="
            consequence = "a `deepspeed` by hand ends with a ValueError where there are several hosts"
        elif key.strip().startswith("#"):
            what = "is a comment with a ="
            consequence = "it comments out the remote command of a `deepspeed` by hand, which ends with status 0"
        else:
            continue
        good = False
        yield warning("surroundings", f"{file}: line {number} {what}: {consequence}", "keep NAME=VALUE lines only")
    if good:
        yield ok("surroundings", f"{file} sets variables on every host")


def programs(launch: LaunchSection) -> Iterator[Finding]:
    """The programs that start the ranks, but for Slurm's."""
    needed = [] if launch.launcher == "slurm" else launchers.programs(launch)
    missing = [name for name in needed if shutil.which(name) is None]
    for name in missing:
        cure = f"install it: apt-get install {PACKAGES[name]}"
        yield error("launcher", f"{name}, which launch.launcher={launch.launcher} needs, is not there", cure)
    if "pdsh" in needed and "pdsh" not in missing and "ssh" not in pdsh_modules():
        cure = "install a pdsh with it: apt-get install pdsh; elsewhere pdsh-rcmd-ssh"
        yield error("launcher", "pdsh has no ssh module", cure)
    elif needed and not missing:
        yield ok("launcher", f"{', '.join(needed)} {'are' if len(needed) > 1 else 'is'} there")


def pdsh_modules() -> list[str]:
    """The ways in which this pdsh can reach a host."""
    said = subprocess.run(["pdsh", "-V"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    modules = next((line.partition(":")[2] for line in said.splitlines() if line.startswith("rcmd modules")), "")
    return modules.partition("(")[0].strip().split(",")
