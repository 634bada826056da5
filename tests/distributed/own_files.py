"""Files of a user's own with the names of modules that every rank imports: importing one of them is an error."""

from collections.abc import Iterable
from pathlib import Path

NAMES = (
    *("datasets/__init__.py", "torch/__init__.py", "sparse_zero/__init__.py", "deepspeed/__init__.py"),
    *("launcher.py", "rpn.py", "transformers.py", "accelerate.py", "numpy.py", "yaml.py", "json.py", "tokenize.py"),
)
WITHOUT_SPARSE_ZERO = tuple(name for name in NAMES if not name.startswith("sparse_zero"))
"""For `python -m sparse_zero.train` without -P, where Python itself would import the directory's sparse_zero first."""


def write(directory: Path, names: Iterable[str] = NAMES) -> None:
    """Write the files to a working directory."""
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"raise SystemExit('the file {name} of the working directory is imported')\n")
