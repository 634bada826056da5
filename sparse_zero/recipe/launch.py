"""The `launch` section of a recipe: which ranks `sparse-zero train` starts, where, and what it does when one dies."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Launcher = Literal["local", "deepspeed", "slurm", "mpi", "torchrun"]

SlurmOptions = dict[str, str | int | float | bool | None]


class LaunchSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    launcher: Launcher = "deepspeed"
    """What starts the ranks: nothing in between (`local`, this machine only), DeepSpeed's runner, `srun`, `mpirun` or
    torchrun."""
    nodes: int | Literal["auto"] = "auto"
    """auto: all hosts of the hostfile, all nodes of the Slurm job, or this machine alone."""
    processes_per_node: int | Literal["auto"] = "auto"
    """auto: the hostfile's slots; else one for each accelerator, and one where there is none."""
    hostfile: str | None = None
    """Lines of `HOST slots=N`, as DeepSpeed and Open MPI read them. Without one the ranks are of this machine."""
    include: str | None = None
    """Which hosts of the hostfile: `n1@n2`, and with the deepspeed launcher which devices, as in `n1@n2:0,2`."""
    exclude: str | None = None
    master_addr: str | None = None
    """Where rank 0 is reached. None: the first host's name, or what the scheduler says."""
    master_port: int | Literal["auto"] = "auto"
    multinode: Literal["pdsh", "openmpi"] = "pdsh"
    """What DeepSpeed's runner starts the other hosts' ranks with."""
    launcher_args: list[str] = []
    """More options for `mpirun`, torchrun, or what DeepSpeed's runner starts: [--mca, btl_tcp_if_include, ib0]."""
    environment: dict[str, str | None] = {}
    """Variables for every rank on every host; without a value: as this process has it."""
    prologue: list[str] = []
    """Shell lines that run on every host before Python: `module load cuda/12.8`, `source env/bin/activate`."""
    container: list[str] = []
    """What to put before Python: [apptainer, exec, --nv, image.sif]."""
    slurm: SlurmOptions = {}
    """Options of sbatch and srun by their long names: partition, time, account, gres, ...; true: a flag."""
    max_restarts: int = Field(0, ge=0)
    """How often a run that lost a rank starts again from its newest checkpoint."""
    min_nodes: int | None = Field(None, ge=1)
    """Start again with fewer nodes, but not with fewer than these. None: with all of them only."""
    rendezvous_seconds: float = Field(300, gt=0)
    """How long the ranks that are there wait for the others."""
    silence_seconds: float = Field(30, gt=0)
    """After how long without an answer from its network a host counts as lost."""
    grace_seconds: float = Field(60, gt=0)
    """How long ranks that were told to stop may take to save; what is left then is killed."""

    @field_validator("nodes", "processes_per_node")
    @classmethod
    def _at_least_one(cls, count: int | str) -> int | str:
        if count != "auto" and int(count) < 1:
            raise ValueError(f"{count} cannot run; give 1 or more, or auto")
        return count

    @field_validator("master_port")
    @classmethod
    def _is_a_port(cls, port: int | str) -> int | str:
        if port != "auto" and not 0 < int(port) < 2**16:
            raise ValueError(f"{port} is no port; give 1 to 65535, or auto")
        return port

    @model_validator(mode="after")
    def _fits_the_launcher(self) -> "LaunchSection":
        if self.launcher == "local" and (self.hostfile or self.nodes not in ("auto", 1)):
            raise ValueError("launcher: local starts ranks on this machine only; choose deepspeed, mpi or torchrun")
        if self.launcher == "slurm" and self.hostfile:
            raise ValueError("hostfile: Slurm chooses the nodes itself; leave it out, or choose another launcher")
        if (self.include or self.exclude) and not self.hostfile:
            raise ValueError("include and exclude choose hosts of a hostfile; give launch.hostfile")
        if self.include and self.exclude:
            raise ValueError("include and exclude cannot be given together")
        if self.container and self.launcher == "deepspeed":
            raise ValueError("container: DeepSpeed's runner starts no containers; choose slurm, mpi or torchrun")
        if self.prologue and self.launcher == "deepspeed" and self.hostfile:
            raise ValueError("prologue: DeepSpeed's runner runs none on other hosts; choose slurm, mpi or torchrun")
        if self.nodes not in ("auto", 1) and not self.hostfile and self.launcher in ("deepspeed", "mpi", "torchrun"):
            raise ValueError(
                f"hostfile: {self.nodes} nodes need one with the {self.launcher} launcher; in a Slurm job choose "
                "launcher: slurm"
            )
        if self.min_nodes is not None and self.nodes != "auto" and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes: {self.min_nodes} is more than nodes: {self.nodes}")
        return self
