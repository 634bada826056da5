"""Refuses to train a model whose linear layers are quantised in a format that is not known here."""

import logging
from collections.abc import Collection

from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.quantized.methods import packed_modules
from sparse_zero.quantized.names import WHAT_WORKS
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.patterns import matches, within

logger = logging.getLogger(__name__)


def check_packed(model: nn.Module, config: SparseConfig, whole: Collection[str]) -> None:
    """Raise UserError if `targets` names modules whose packed weights cannot be trained, or are trained in full.
    `targets: all` leaves them out with a warning.

    Args:
        model: the base model.
        config: `targets` and `exclude_modules` are used.
        whole: names of the modules that are trained in full.
    """
    excluded = config.exclude_modules or []
    packed = {
        name: method
        for name, method in packed_modules(model)
        if not any(within(name, pattern) for pattern in excluded)
    }
    in_full = [name for name in packed if any(name == w or name.startswith(f"{w}.") for w in whole)]
    if in_full:
        raise UserError(f"sparse.modules_to_save: {_what(in_full[0], packed)}")
    wanted = [*packed]
    if isinstance(config.targets, list):
        wanted = [name for name in packed if matches(name, config.targets)]
    if not wanted:
        return
    if config.targets == "all":
        more = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        logger.warning(
            "sparse.targets: all leaves out %s%s, quantised by %s, which cannot be trained",
            wanted[0],
            more,
            packed[wanted[0]],
        )
        return
    raise UserError(f"sparse.targets: {_what(wanted[0], packed)}; load another checkpoint, or exclude it")


def _what(name: str, packed: dict[str, str]) -> str:
    return f"{name} is quantised by {packed[name]}, whose weights cannot be trained; those in {WHAT_WORKS} can"
