"""torchrun that exits with the status of the first failed rank, and prints no report.

    python -m launcher.ways.torchrun --standalone --nproc-per-node 2 -m sparse_zero.train demo.yaml

All options are torchrun's. After a failure the `torchrun` script exits with status 1 and prints forty lines about
itself, which hide the line that the rank printed.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Run torchrun on sys.argv. The status is 128 + n if signal n killed the first failed rank or this process."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
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
