"""The recipes, DeepSpeed files and batch scripts that are installed with the package. Imports no torch."""

import json
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from sparse_zero.errors import UserError, did_you_mean

KINDS = {".yaml": "recipe", ".json": "DeepSpeed file", ".sbatch": "batch script"}
"""By suffix, in the order in which `sparse-zero recipes` lists them."""


class ShippedFile(NamedTuple):
    """One installed file."""

    name: str
    kind: str
    about: str
    """One sentence."""


def directory() -> Path:
    """The directory that contains them."""
    return Path(str(files("sparse_zero.recipe"))) / "configs"


def names(*suffixes: str) -> list[str]:
    """The names of the files with one of these suffixes; without suffixes, of all files."""
    found = [f.name for f in directory().iterdir() if f.suffix in KINDS and f.suffix in (suffixes or KINDS)]
    return sorted(found, key=lambda name: ([*KINDS].index(Path(name).suffix), name))


def find(name: str | Path, *suffixes: str) -> Path | None:
    """The path of a shipped file, or None if there is no file of that name.

    Args:
        name: `NAME` or, as in a checkout, `configs/NAME`.
        suffixes: of the files to look among; empty: all.
    """
    path = Path(name)
    is_bare = path.parts[:-1] in ((), ("configs",))
    return directory() / path.name if is_bare and path.name in names(*suffixes) else None


def describe() -> list[ShippedFile]:
    """All shipped files: first the recipes, then the DeepSpeed files, then the batch scripts."""
    return [ShippedFile(name, KINDS[Path(name).suffix], _about(directory() / name)) for name in names()]


def copy(name: str, to: str | Path | None = None) -> Path:
    """Copy a shipped file, and return the path of the copy.

    Args:
        to: the new file, or a directory to write it to; None: the working directory.

    Raises:
        UserError: there is no shipped file of that name, the new file exists, or it cannot be written.
    """
    source = find(name)
    if source is None:
        near = did_you_mean(name, names()) or f"; there are {', '.join(names())}"
        raise UserError(f"{name}: sparse-zero ships no file of that name{near}")
    out = Path(to) if to is not None else Path(source.name)
    out = out / source.name if out.is_dir() else out
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{out}: already exists; remove it, or name another file: recipes copy {name} FILE") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return out


def _about(file: Path) -> str:
    """The first line of the comment at the top, which must be one sentence. Of a DeepSpeed file, what it partitions
    and offloads.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return _about_deepspeed(json.loads(text)["zero_optimization"])
    comment = next(line for line in text.splitlines() if line.startswith("# "))
    return comment.removeprefix("# ").rstrip(":.")


def _about_deepspeed(zero: dict) -> str:
    partitioned = ["optimizer state", "gradients", "parameters"][: zero["stage"]]
    offloaded = [
        what for what, key in (("the optimizer", "offload_optimizer"), ("parameters", "offload_param")) if key in zero
    ]
    about = f"ZeRO stage {zero['stage']}: partitions {_listed(partitioned)}"
    return f"{about}; offloads {_listed(offloaded)}" if offloaded else about


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
