"""Names package://PACKAGE/PATH: a file or directory in an installed package. Does not import torch."""

import importlib.util
from pathlib import Path

from sparse_zero.errors import UserError

SCHEME = "package://"


def package_path(name: str) -> str:
    """The path of `package://PACKAGE/PATH`. The package is not imported. Other names are returned unchanged.

    Raises:
        UserError: the package is not installed, or has no such path.
    """
    if not name.startswith(SCHEME):
        return name
    package, _, path = name.removeprefix(SCHEME).partition("/")
    if not package.isidentifier():
        raise UserError(f"'{name}': write package://PACKAGE/PATH, where PACKAGE is the name in `import PACKAGE`")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        install = f"pip install {package.replace('_', '-')}"
        raise UserError(f"'{name}': '{package}' is not an installed package; try `{install}`")
    paths = [Path(root, path) for root in spec.submodule_search_locations]
    for found in paths:
        if found.exists():
            return str(found)
    raise UserError(f"'{name}': the package '{package}' has no '{path}' ({paths[0]} does not exist)")
