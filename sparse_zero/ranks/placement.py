"""The rank, world size and master address of this process, from its launcher's environment. Does not import torch.

torchrun and DeepSpeed set RANK, WORLD_SIZE and so on. srun and mpirun use other names and do not set the address of
rank 0.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from sparse_zero.errors import UserError
from sparse_zero.ranks.network import free_port

_SLURM_PORTS = range(20_000, 30_000)
"""Below the ephemeral ports, which begin at 32,768."""


@dataclass(frozen=True)
class Placement:
    """The rank of a process, its world size, and the address at which the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "Placement | None":
        """The placement that the launcher's variables describe; None if no launcher started this process.

        Args:
            environ: the environment variables; by default those of this process.

        Raises:
            UserError: a launcher's variables are incomplete or invalid.
        """
        environ = os.environ if environ is None else environ
        for variable, read in (
            ("RANK", _from_torch),
            ("OMPI_COMM_WORLD_RANK", _from_open_mpi),
            ("MPI_LOCALRANKID", _from_hydra),
            ("SLURM_PROCID", _from_slurm),
        ):
            if variable in environ and not _is_batch_script(environ, variable):
                return read(environ)
        return None

    @classmethod
    def single_process(cls) -> "Placement":
        """The placement of a run that has only one rank."""
        return cls(0, 1, 0, 1, "127.0.0.1", free_port())

    @property
    def is_on_one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.world_size == self.local_world_size

    def export(self) -> None:
        """Set the environment variables that torch, Accelerate and DeepSpeed read."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def _is_batch_script(environ: Mapping[str, str], variable: str) -> bool:
    """Whether this process is a Slurm batch script, which is no rank.

    sbatch sets SLURM_PROCID=0 in the batch script as well. Only srun starts steps with tasks.
    """
    return variable == "SLURM_PROCID" and ("SLURM_STEP_ID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ)


def _from_torch(environ: Mapping[str, str]) -> Placement:
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if not environ.get(name)]
    world_size = _number(environ, "WORLD_SIZE") if not missing else 0
    if world_size > 1:
        missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"RANK={environ['RANK']} is set, but not {' and '.join(missing)}: start the ranks with sparse-zero train, "
            "deepspeed, torchrun, srun or mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return Placement(
        _number(environ, "RANK"),
        world_size,
        _number(environ, "LOCAL_RANK"),
        # DeepSpeed's runner calls it LOCAL_SIZE and does not set it for MPI.
        int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or 1),
        environ.get("MASTER_ADDR") or "127.0.0.1",
        _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else 29500,
    )


def _from_open_mpi(environ: Mapping[str, str]) -> Placement:
    rank, world_size = _number(environ, "OMPI_COMM_WORLD_RANK"), _number(environ, "OMPI_COMM_WORLD_SIZE")
    local_rank = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    local_world_size = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Placement(rank, world_size, local_rank, local_world_size, *_mpi_master(environ, world_size))


def _from_hydra(environ: Mapping[str, str]) -> Placement:
    """MPICH and Intel MPI."""
    rank, world_size = _number(environ, "PMI_RANK"), _number(environ, "PMI_SIZE")
    local_rank = _number(environ, "MPI_LOCALRANKID")
    local_world_size = _number(environ, "MPI_LOCALNRANKS")
    return Placement(rank, world_size, local_rank, local_world_size, *_mpi_master(environ, world_size))


def _from_slurm(environ: Mapping[str, str]) -> Placement:
    local_rank = _number(environ, "SLURM_LOCALID")
    world_size = int(environ.get("SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS"))
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    local_world_size = expand_counts(per_node)[_number(environ, "SLURM_NODEID")]
    master = environ.get("MASTER_ADDR")
    if not master:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        master = node_address(first_node(nodes)) if world_size > local_world_size else "127.0.0.1"
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else slurm_port(environ)
    return Placement(_number(environ, "SLURM_PROCID"), world_size, local_rank, local_world_size, master, port)


def slurm_port(environ: Mapping[str, str]) -> int:
    """The port for the rendezvous of a Slurm step's ranks.

    This is the first port that Slurm has reserved for the step (MpiParams). Without a reservation, all ranks compute
    the same port from the numbers of the job and the step, so that steps on a shared node use different ports.
    """
    reserved = environ.get("SLURM_STEP_RESV_PORTS")
    if reserved:
        return int(re.match(r"\d+", reserved).group())
    step = int(environ.get("SLURM_STEP_ID") or 0)
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return _SLURM_PORTS[(int(environ["SLURM_JOB_ID"]) * 97 + step * 7 + restarts) % len(_SLURM_PORTS)]


def expand_counts(text: str) -> list[int]:
    """Expand Slurm's short form of one number per node: `2(x3),1` is [2, 2, 2, 1].

    Raises:
        UserError: the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={text} is not a list of counts, such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_node(nodelist: str) -> str:
    """The first name of a Slurm node list in short form: for `gpu[07-09,12],login1` it is gpu07.

    Raises:
        UserError: the text has another form.
    """
    match = re.match(r"(?:[^,\[]|\[\d[^\]]*\])+", nodelist)
    if match is None:
        raise UserError(
            f"SLURM_JOB_NODELIST={nodelist} is not a node list; set MASTER_ADDR to the name of the first node"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def node_address(node: str) -> str:
    """A name or address at which a Slurm node can be reached: its own name if it resolves, else Slurm's NodeAddr."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        import subprocess

        try:
            shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return node
        match = re.search(r"NodeAddr=(\S+)", shown.stdout)
        return match[1] if match else node
    return node


def _mpi_master(environ: Mapping[str, str], world_size: int) -> tuple[str, int]:
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        return environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    if world_size == 1:
        return "127.0.0.1", free_port()
    try:
        import mpi4py

        # The exit status tells whether a rank failed. A failing rank must not wait for the others in MPI_Finalize.
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun does not set the address of rank 0, and mpi4py cannot be imported to find it ({error}): "
            "pip install mpi4py, or pass the first host: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..."
        ) from None
    host = environ.get("MASTER_ADDR") or socket.gethostname()
    master = MPI.COMM_WORLD.bcast((host, free_port()), root=0)
    MPI.Finalize()
    return master


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise UserError(f"{name} must be an integer, but is {environ.get(name, 'not set')}") from None
