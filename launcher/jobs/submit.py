"""Submits a recipe's run as a Slurm job: the batch script in the run's directory, and the call of sbatch."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.jobs import sbatch_options
from launcher.jobs.batch_script import batch_script
from launcher.ways.command import Command
from launcher.ways.slurm import option_words
from sparse_zero.errors import UserError
from sparse_zero.recipe.launch import SlurmOptions
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.secrets import hide_values

SCRIPT_NAME = "submit.sbatch"


@dataclass(frozen=True)
class Job:
    """A job to submit."""

    script: Path
    text: str
    command: Command
    options: SlurmOptions


@dataclass(frozen=True)
class Submission:
    """The answer of sbatch."""

    job: str
    cluster: str | None
    log: str
    warnings: str

    def commands(self, script: Command) -> dict[str, str]:
        """Commands to follow, stop and resume the job, by purpose.

        Args:
            script: the command that submitted it.
        """
        where = ["--clusters", self.cluster] if self.cluster else []
        return {
            # -F: the log does not exist before the job starts.
            "follow": shlex.join(["tail", "-F", self.log]),
            "state": shlex.join(["squeue", *where, "--jobs", self.job]),
            "save and stop": shlex.join(["scancel", *where, "--batch", "--signal=TERM", self.job]),
            "save and queue again": shlex.join(["scancel", *where, "--batch", "--signal=USR1", self.job]),
            "resume": script.shell(),
        }


def plan(
    recipe: Recipe, path: str, overrides: Sequence[str] = (), given: SlurmOptions | None = None, merge: bool = False
) -> Job:
    """The job that runs `recipe`, which was read from `path` with `overrides`. Writes nothing.

    Args:
        given: options of sbatch that override the recipe's.

    Raises:
        UserError: see sbatch_options.job_options; the directory of a log does not exist.
    """
    output = Path(str(recipe.training["output_dir"]))
    options = _options(recipe, output, given or {})
    # The values of variables reach the job in its environment, and not in the script.
    overrides, names = hide_values(overrides)
    private = {name: value for name in names if (value := recipe.launch.environment[name]) is not None}
    words = [path, *overrides, *(["--merge"] if merge else [])]
    about = shlex.join(["sparse-zero", "submit", *words, *option_words(given or {})])
    train = shlex.join([*_this_program(), "train", *words])
    text = batch_script(about, options, train, recipe.launch.prologue)
    script = _place(output, text)
    # Variables of the user's shell would override the script.
    removed = {name: None for name in map(_variable, options) if name in os.environ}
    return Job(script, text, Command(["sbatch", "--parsable", str(script)], removed, private=private), options)


def submit(job: Job) -> Submission:
    """Write the script and pass it to sbatch.

    Raises:
        UserError: there is no sbatch, it rejects the job, or the script cannot be written. No file is left behind.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; submit from a host of a Slurm cluster, or print the script with --dry-run")
    with _written(job):
        done = subprocess.run(job.command.argv, env=job.command.environ(), capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(f"sbatch rejects the job: {_messages(done.stderr) or f'status {done.returncode}'}")
        # A site's plugins may print more than --parsable says.
        answer = re.search(r"^(\d+)(?:;(\S+))?$", done.stdout, re.MULTILINE)
        if answer is None:
            raise UserError(f"sbatch printed no job number: {_messages(done.stdout + done.stderr) or 'no output'}")
    log = os.path.join(str(job.options.get("chdir", "")), sbatch_options.log_path(job.options, answer[1]))
    return Submission(answer[1], answer[2], log, _messages(done.stderr))


def _options(recipe: Recipe, output: Path, given: SlurmOptions) -> SlurmOptions:
    launch = recipe.launch
    defaults = {
        "job-name": str(recipe.training["run_name"]),
        "chdir": os.getcwd(),
        "output": os.path.join(os.path.abspath(output).replace("%", "%%"), "slurm-%j.log"),
        "open-mode": "append",
        "nodes": 1 if launch.nodes == "auto" else launch.nodes,
        # The run restarts by itself on the nodes that are left.
        "no-kill": launch.min_nodes is not None,
    }
    options = sbatch_options.job_options(
        defaults, launch.slurm, given, launch.processes_per_node, bool(recipe.training.get("use_cpu"))
    )
    for name in ("output", "error"):
        log = Path(str(options.get("chdir", "")), str(options.get(name, "")))
        if options.get(name) != defaults.get(name) and "%" not in str(log.parent) and not log.parent.is_dir():
            raise UserError(f"--{name}: {log.parent}: no such directory; Slurm would end the job without a message")
    return options


def _this_program() -> list[str]:
    script = Path(sys.executable).with_name("sparse-zero")
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "launcher"]


def _place(output: Path, text: str) -> Path:
    """The script's path. A script of another job is kept; one with the same text is used again."""
    number, script = 1, output / SCRIPT_NAME
    while script.exists() and script.read_bytes() != text.encode():
        number += 1
        script = output / SCRIPT_NAME.replace(".", f"-{number}.")
    return script


@contextlib.contextmanager
def _written(job: Job) -> Iterator[None]:
    """Write the script and its directory. If the block raises, remove what did not exist before."""
    new = [path for path in (job.script, *job.script.parents) if not path.exists()]
    try:
        job.script.parent.mkdir(parents=True, exist_ok=True)
        if job.script in new:
            job.script.write_text(job.text, encoding="utf-8")
            job.script.chmod(0o755)
    except OSError as error:
        raise UserError(f"{job.script}: cannot be written ({error.strerror})") from None
    try:
        yield
    except BaseException:
        for path in new:
            # A directory that is not empty by now stays.
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _messages(text: str) -> str:
    """The output of sbatch, without the program's name at the start of every line."""
    lines = [re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("Try "))


def _variable(option: str) -> str:
    """The environment variable that overrides an option of sbatch."""
    odd = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}
    return "SBATCH_" + odd.get(option, option.upper().replace("-", "_"))
