"""Custom noise functions, which a recipe names as FILE.py:FUNCTION or MODULE:FUNCTION."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rpn.config import file_of


class NoiseNotFound(ValueError):
    """`RPNConfig.noise` names a file, a module or a function that does not exist."""


def load_noise(noise: str) -> Callable:
    """The function that `RPNConfig.noise` names.

    Args:
        noise: FILE.py:FUNCTION, where FILE.py is a path, or MODULE:FUNCTION, where MODULE is found on sys.path.

    Raises:
        NoiseNotFound: there is no such file, module or function. Exceptions of the user's code pass through.
    """
    place, _, name = noise.rpartition(":")
    module = _load_file(Path(place)) if file_of(noise) else _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        problem = f"has no function '{name}'" if function is None else f"'{name}' is not a function"
        raise NoiseNotFound(f"{place}: {problem}")
    return function


def _load_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise NoiseNotFound(f"{file}: no such file")
    # The name must not be that of an installed module: the user's file may be called json.py.
    name = f"_rpn_noise_{hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except TypeError:
        if not name.startswith("."):
            raise  # by the user's module
        raise NoiseNotFound(f"'{name}' is not the name of a module; give a file as {name}.py:FUNCTION") from None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports
        raise NoiseNotFound(
            f"there is no module '{name}': install it, add its directory to PYTHONPATH, or give a file as "
            f"{name.replace('.', '/')}.py:FUNCTION"
        ) from None
