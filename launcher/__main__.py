"""`python -m launcher` is `sparse-zero`."""

import sys

from launcher.cli import main

sys.exit(main())
