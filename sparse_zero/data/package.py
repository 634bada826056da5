"""Addresses package://PACKAGE/PATH: a file or directory that an installed package ships. Imports no torch."""

import importlib.util
from pathlib import Path

from sparse_zero.errors import UserError

SCHEME = "package://"


def package_path(name: str) -> str:
    """The path behind `package://PACKAGE/PATH`, found without importing the package; any other name unchanged.

    Raises UserError: the package is not installed, or ships nothing at that path.
    """
    if not name.startswith(SCHEME):
        return name
    package, _, path = name.removeprefix(SCHEME).partition("/")
    if not package.isidentifier():
        raise UserError(f"'{name}': write package://PACKAGE/PATH with the name that `import` takes")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        install = f"pip install {package.replace('_', '-')}"
        raise UserError(f"'{name}': '{package}' is not an installed package; try `{install}`")
    places = [Path(root, path) for root in spec.submodule_search_locations]
    for place in places:
        if place.exists():
            return str(place)
    raise UserError(f"'{name}': the package '{package}' is installed, but has no '{path}' ({places[0]} is not there)")
