"""torchrun that ends with the exit status of the rank that failed first, and without a report of its own.

    python -m launcher.ways.torchrun --standalone --nproc-per-node 2 -m sparse_zero.train configs/demo.yaml

All options are torchrun's. The `torchrun` script ends every failure with status 1 and forty lines about the
launcher's own internals, in which the line that the rank printed is lost.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Run torchrun on sys.argv; the status is 128 + n where signal n ended the first failed rank or this process."""
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
