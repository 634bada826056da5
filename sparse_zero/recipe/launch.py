"""The `launch` section of a recipe: where `sparse-zero train` starts ranks, and what it does when one fails."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparse_zero.recipe.names import has_control_character, is_address, is_option, is_variable

Launcher = Literal["local", "deepspeed", "slurm", "mpi", "torchrun"]

SlurmOptions = dict[str, str | int | float | bool | None]


class LaunchSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    launcher: Launcher = "deepspeed"
    """The program that starts the ranks: DeepSpeed's runner, `srun`, `mpirun` or torchrun. local: `sparse-zero`
    itself, on this machine only."""
    nodes: int | Literal["auto"] = "auto"
    """The number of hosts. auto: all hosts of the hostfile, all nodes of the Slurm job, or this machine alone."""
    processes_per_node: int | Literal["auto"] = "auto"
    """The number of ranks on each host. auto: the hostfile's slots, else one per accelerator, or one without
    accelerators."""
    hostfile: str | None = None
    """A file with lines `HOST slots=N`, as DeepSpeed and Open MPI read it. None: the ranks run on this machine."""
    include: str | None = None
    """The hosts of the hostfile to use: `n1@n2`; with the deepspeed launcher also their devices: `n1@n2:0,2`."""
    exclude: str | None = None
    """The hosts or devices not to use, in the same form."""
    master_addr: str | None = None
    """The address of rank 0. None: the first host's name, or the scheduler's choice."""
    master_port: int | Literal["auto"] = "auto"
    """The port of rank 0. auto: a free port."""
    multinode: Literal["pdsh", "openmpi"] = "pdsh"
    """The program with which DeepSpeed's runner starts ranks on other hosts."""
    launcher_args: list[str] = []
    """Additional options of `mpirun`, `srun`, torchrun, or the program that DeepSpeed's runner starts:
    [--mca, btl_tcp_if_include, ib0]."""
    environment: dict[str, str | None] = {}
    """Environment variables of every rank on every host; null passes on this process's value."""
    prologue: list[str] = []
    """Shell lines to run on every host before Python: `module load cuda/12.8`, `source env/bin/activate`."""
    container: list[str] = []
    """A command to run Python in a container: [apptainer, exec, --nv, image.sif]."""
    slurm: SlurmOptions = {}
    """Options of sbatch and srun by their long names: partition, time, account, gres, ...; true: a flag."""
    max_restarts: int = Field(0, ge=0)
    """How many times a run that lost a rank restarts from its newest checkpoint."""
    min_nodes: int | None = Field(None, ge=1)
    """The minimum number of nodes of a restart. None: all of them."""
    rendezvous_seconds: float = Field(300, gt=0)
    """How long ranks wait for the others at the rendezvous."""
    silence_seconds: float = Field(30, gt=0)
    """How long a host may be silent on the network before it counts as lost."""
    grace_seconds: float = Field(60, gt=0)
    """How long ranks may take to save a checkpoint after a stop signal; then they are killed."""

    @field_validator("nodes", "processes_per_node")
    @classmethod
    def _at_least_one(cls, count: int | str) -> int | str:
        if count != "auto" and int(count) < 1:
            raise ValueError(f"{count} is not a positive number; give 1 or more, or auto")
        return count

    @field_validator("master_port")
    @classmethod
    def _is_a_port(cls, port: int | str) -> int | str:
        if port != "auto" and not 0 < int(port) < 2**16:
            raise ValueError(f"{port} is not a port number; give 1 to 65535, or auto")
        return port

    @field_validator("master_addr")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is not None and not is_address(address):
            raise ValueError(f"{address!r} is not a host name or address; give one such as n1 or 10.0.0.1")
        return address

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, environment: dict[str, str | None]) -> dict[str, str | None]:
        for name, value in environment.items():
            if not is_variable(name):
                raise ValueError(f"{name!r} cannot be a variable: use letters, digits and _, with no digit in front")
            if value is not None and "\0" in value:
                raise ValueError(f"the value of {name} has a NUL character, which no variable can hold")
        return environment

    @field_validator("slurm")
    @classmethod
    def _are_options(cls, options: SlurmOptions) -> SlurmOptions:
        for name, value in options.items():
            if not is_option(name):
                raise ValueError(f"{name!r} cannot be an option: use its long name without dashes, as in partition")
            if has_control_character(str(value)):
                raise ValueError(f"the value of {name} has a line break or another control character: {value!r}")
        return options

    @field_validator("launcher_args", "container", "prologue")
    @classmethod
    def _are_words(cls, words: list[str]) -> list[str]:
        for word in words:
            if "\0" in word:
                raise ValueError(f"{word!r} has a NUL character, which no word of a command can hold")
        return words

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
            raise ValueError(
                "prologue: DeepSpeed's runner does not run it on other hosts; choose slurm, mpi or torchrun"
            )
        if self.nodes not in ("auto", 1) and not self.hostfile and self.launcher in ("deepspeed", "mpi", "torchrun"):
            raise ValueError(
                f"hostfile: the {self.launcher} launcher needs one for {self.nodes} nodes; in a Slurm job choose "
                "launcher: slurm"
            )
        if self.min_nodes is not None and self.nodes != "auto" and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes: {self.min_nodes} is more than nodes: {self.nodes}")
        return self
