"""Finds a recipe, and the files that it names: first here, then among the shipped files. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from sparse_zero.errors import UserError, did_you_mean, nearest
from sparse_zero.recipe import shipped

SUFFIXES = (".yaml", ".yml")


def find_recipe(path: str | Path) -> Path:
    """`path` itself if it exists, else the shipped recipe of that name.

    Raises:
        UserError: there is neither. The message says where it was looked for, and names a similar one.
    """
    path = Path(path)
    found = path if path.exists() else shipped.find(path, *SUFFIXES)
    if found is not None:
        return found
    # Compared without their suffix, which all have in common.
    known = {Path(name).stem: name for name in shipped.names(*SUFFIXES)}
    known |= {file.stem: str(file) for file in _files(path.parent, SUFFIXES)}
    near = nearest(path.stem, known, 1)
    hint = f"; did you mean '{known[near[0]]}'?" if near else ""
    where = "neither at that path nor among the shipped ones (`sparse-zero recipes` lists them)"
    raise UserError(f"{path}: no such recipe, {where}{hint}")


def find_named_file(key: str, name: str, recipe: Path, *suffixes: str) -> Path:
    """The file that a recipe names: next to the recipe, in the working directory, or among the shipped files.

    Args:
        key: of the recipe, for the message.
        recipe: the recipe's path. Files next to a shipped recipe are searched after the working directory.
        suffixes: of the files to look among.

    Raises:
        UserError: there is no such file. The message says where it was looked for, and names a similar one.
    """
    is_shipped = recipe.parent.resolve() == shipped.directory().resolve()
    places = [Path(), recipe.parent] if is_shipped else [recipe.parent, Path()]
    for candidate in (*(place / name for place in places), shipped.find(name, *suffixes)):
        if candidate is not None and candidate.is_file() and _may_be_named(candidate, suffixes):
            return candidate
    ours = shipped.names(*suffixes)
    known = sorted({*ours, *(file.name for place in places for file in _files(place, suffixes))})
    hint = did_you_mean(name, known) or (f"; there are {', '.join(known)}" if known else "")
    where = ", in the working directory or among the shipped files" if ours else " or in the working directory"
    raise UserError(f"{key}: no file '{name}' beside the recipe{where}{hint}")


def _may_be_named(file: Path, suffixes: Iterable[str]) -> bool:
    """Whether a recipe may mean this file. A shipped file of another kind is a mistake, as `deepspeed: demo.yaml`."""
    return file.suffix in suffixes or file.parent.resolve() != shipped.directory().resolve()


def _files(directory: Path, suffixes: Iterable[str]) -> list[Path]:
    if not directory.is_dir():
        return []
    return [file for file in sorted(directory.iterdir()) if file.suffix in suffixes and file.is_file()]
