"""What DeepSpeed ZeRO does to parameters, behind a few functions that also work without it."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 holds this parameter in pieces (it is whole only while gathered)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape that the parameter has when whole."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def full_numel(parameter: nn.Parameter) -> int:
    return full_shape(parameter).numel()


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Within this block the parameters are whole, on every rank. A collective call under ZeRO stage 3.

    Args: write: keep what rank 0 writes into them; without it changes are lost when the block ends.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield
