"""Checks of the machine that starts a run: hidden settings that change the run, and the launcher's programs."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.ways import launchers
from sparse_zero.recipe.launch import LaunchSection

PACKAGES = {"ssh": "openssh-client", "pdsh": "pdsh", "mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"}
"""The Debian package of each program that starts ranks on other hosts."""


def hidden_settings(environment: Mapping[str, str], home: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Checks files and variables that DeepSpeed's runner and pdsh obey without a message.

    `sparse-zero train` protects its own runs from them; they affect a `deepspeed` command that is typed by hand.

    Args:
        environment: environment variables.
        home: the user's home directory.
        root: root of the file system, for tests.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for file in dict.fromkeys((home / name, Path(name).absolute())):
        if file.is_file():
            yield from _deepspeed_environment(file)
    hostfile = root / "job" / "hostfile"
    if hostfile.is_file():
        remedy = "remove it, or always use deepspeed --hostfile; `sparse-zero train` only reads launch.hostfile"
        message = f"{hostfile}: a `deepspeed` command typed by hand starts its ranks on the hosts in it"
        yield warning("environment", message, remedy)
    kind = environment.get("PDSH_RCMD_TYPE", "ssh")
    if kind != "ssh":
        message = f"PDSH_RCMD_TYPE={kind}: a pdsh command typed by hand uses {kind}; a run always uses ssh"
        yield warning("environment", message, "unset PDSH_RCMD_TYPE")


def _deepspeed_environment(file: Path) -> Iterator[Finding]:
    is_valid = True
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        key, equals, _ = line.partition("=")
        if not equals:
            what = "is blank" if not line.strip() else "has no ="
            consequence = "a `deepspeed` command typed by hand fails with a ValueError on several hosts"
        elif key.strip().startswith("#"):
            what = "is a comment with a ="
            consequence = (
                "it comments out the remote command of a `deepspeed` command typed by hand, which then does nothing "
                "and exits with status 0"
            )
        else:
            continue
        is_valid = False
        yield warning("environment", f"{file}: line {number} {what}: {consequence}", "keep only NAME=VALUE lines")
    if is_valid:
        yield ok("environment", f"{file} sets variables on every host")


def launcher_programs(launch: LaunchSection) -> Iterator[Finding]:
    """Checks that the programs that start the ranks are installed. `slurm_checks` checks Slurm's."""
    needed = [] if launch.launcher == "slurm" else launchers.programs(launch)
    missing = [name for name in needed if shutil.which(name) is None]
    for name in missing:
        message = f"{name} is not installed; launch.launcher={launch.launcher} needs it"
        yield error("launcher", message, f"install it: apt-get install {PACKAGES[name]}")
    if "pdsh" in needed and "pdsh" not in missing and "ssh" not in pdsh_modules():
        remedy = "install pdsh with its ssh module: apt-get install pdsh; on other systems pdsh-rcmd-ssh"
        yield error("launcher", "pdsh has no ssh module", remedy)
    elif needed and not missing:
        yield ok("launcher", f"{', '.join(needed)} {'are' if len(needed) > 1 else 'is'} installed")


def pdsh_modules() -> list[str]:
    """The remote command modules that the installed pdsh has, as in ["ssh", "rsh", "exec"]."""
    output = subprocess.run(["pdsh", "-V"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    modules = next((line.partition(":")[2] for line in output.splitlines() if line.startswith("rcmd modules")), "")
    return modules.partition("(")[0].strip().split(",")
