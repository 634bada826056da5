"""The hosts that the tests of a session share, Slurm on two of them, and a look at what each test leaves there."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import SYSTEM_PATH, Hosts, need
from lab_slurm import Slurm
from workload import RANKS, Workload, losses

from sparse_zero.gradient import cpu
from sparse_zero.ranks.extension_locks import remove_abandoned_locks

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """What an administrator would have set up on every host."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The operators, of which DeepSpeed's takes a minute to compile, are those of the other tests.
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        # Every host is root's, and has this account only.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **{name: value for name, value in os.environ.items() if name.startswith("HF_")},
    }


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """n1, n2 and n3, connected."""
    need("hosts")
    cpu.load_operator()  # built before anything is timed
    hosts = Hosts(tmp_path_factory.mktemp("lab"), ["n1", "n2", "n3"], environment())
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Slurm:
    """A partition `main` of n1, which is also the controller, and n2."""
    need("slurm")
    return Slurm(hosts, ["n1", "n2"])


@pytest.fixture(scope="session")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The recipe that the tests train, with its base and data."""
    return Workload(tmp_path_factory.mktemp("workload"))


@pytest.fixture(scope="session")
def one_host_losses(hosts: Hosts, workload: Workload) -> dict[int, float]:
    """The losses of the workload's run on two ranks of one host, by step."""
    output = workload.directory / "one-host"
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", RANKS, "-m", "sparse_zero.train"]
    # The first run on a machine compiles DeepSpeed's operator.
    hosts["n1"].run(*torchrun, workload.recipe, f"training.output_dir={output}", timeout=400)
    return losses(output)


@pytest.fixture(autouse=True)
def nothing_left(hosts: Hosts) -> Iterator[None]:
    """A test leaves no process on any host; what it cut, killed or drained is mended for the next one."""
    yield
    left = hosts.end_strays()
    # Killed ranks may have held some, and the hosts do not see each other's processes
    remove_abandoned_locks()
    hosts.heal()
    assert not left, "left running:\n" + "\n".join(left)
