"""One rank that is given one bad recipe after the other: OUT RECIPE..."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from sparse_zero.train import main

if __name__ == "__main__":
    out, *recipes = sys.argv[1:]
    seen = {}
    for recipe in recipes:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            status = main([recipe])
        seen[Path(recipe).stem] = {"status": status, "printed": printed.getvalue()}
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
