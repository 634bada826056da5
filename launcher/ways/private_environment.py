"""How private variables reach ranks on other hosts: in a shell file of mode 0600 on the disk that the hosts share.

A command line, which every user of a host can read with `ps`, holds the file's name only.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "environment"


def text(variables: Mapping[str, str]) -> str:
    """The text of the file: shell lines that set and export the variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def shown_text(names: Iterable[str]) -> str:
    """The text of the file for people, without the values."""
    return "".join(f'export {name}="${name}"\n' for name in names)


def check(file: Path, otherwise: str = "exit 2") -> str:
    """A shell command that prints why a host cannot read the file, if so, and then runs `otherwise`."""
    message = f"cannot read {file}: training.output_dir must be on a disk that all hosts share"
    said = f'echo "sparse-zero: error: $(hostname)" {shlex.quote(message)} >&2'
    return f"[ -r {shlex.quote(str(file))} ] || {{ {said}; {otherwise}; }}"


def read(file: Path) -> str:
    """A shell command that sets and exports the variables, or ends the shell."""
    return f"{{ {check(file)}; }} && . {shlex.quote(str(file))}"


def reference(file: Path, name: str) -> str:
    """A word of a shell within double quotes, which the shell replaces by a variable's value."""
    return f'$(. {shlex.quote(str(file))} && printf %s "${name}")'
