"""torchrun that exits with the status of the first failed rank, and prints no report.

    python -m launcher.ways.torchrun --standalone --nproc-per-node 2 -m sparse_zero.train demo.yaml

All options are torchrun's. A single agent also has `--rdzv-backend one-machine --rdzv-endpoint 127.0.0.1:PORT`: it
serves no store, and rank 0 serves its own, which outlives the agent.

After a failure the `torchrun` script exits with status 1 and prints forty lines about itself, which hide the line that
the rank printed.
"""

import logging
import sys

from torch.distributed import HashStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from launcher.ways.command import ONE_MACHINE


class OneMachine(RendezvousHandler):
    """The rendezvous of an agent that has no others to meet."""

    use_agent_store = False

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._parameters = parameters
        self._is_closed = False

    def get_backend(self) -> str:
        return ONE_MACHINE

    def get_run_id(self) -> str:
        return self._parameters.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        meeting = RendezvousStoreInfo(*parse_rendezvous_endpoint(self._parameters.endpoint, default_port=29500))
        return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=meeting)

    def is_closed(self) -> bool:
        return self._is_closed

    def set_closed(self) -> None:
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        self._is_closed = True
        return True


def main() -> int:
    """Run torchrun on sys.argv. The status is 128 + n if signal n killed the first failed rank or this process."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    rendezvous_handler_registry.register(ONE_MACHINE, OneMachine)
    try:
        run.main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
