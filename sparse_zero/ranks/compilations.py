"""Says when a C++ operator is compiled, which takes up to minutes at its first use on a machine."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def announce_compilations() -> None:
    """Log a line before torch compiles an operator, DeepSpeed's or ours. It is compiled without a word otherwise."""
    from torch.utils import cpp_extension

    if not hasattr(cpp_extension.load, "is_announced"):
        cpp_extension.load = _announced(cpp_extension.load, cpp_extension._get_build_directory)


def _announced(load: Callable[..., Any], directory_of: Callable[[str, bool], str]) -> Callable[..., Any]:
    @functools.wraps(load)
    def announced(name: str, *args: Any, **kwargs: Any) -> Any:
        directory = kwargs.get("build_directory") or directory_of(name, False)
        if not any(Path(directory).glob("*.so")):
            logger.warning("compiling the operator %s, once on this machine; it may take some minutes", name)
        return load(name, *args, **kwargs)

    announced.is_announced = True
    return announced
