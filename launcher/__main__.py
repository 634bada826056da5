"""`python -m launcher` is the command `sparse-zero`."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
    # See sparse_zero.train.
    del sys.path[0]

from launcher.cli import main

sys.exit(main())
