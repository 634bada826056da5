"""What tells one base model from another: a few scalars of each weight, hashed."""

import functools
from collections.abc import Collection

import torch
import xxhash
from torch import nn

from sparse_zero.selection.rules import stratified_positions
from sparse_zero.zero.parameters import gathered

SAMPLES = 64
"""Scalars of each weight. Any fine-tuning of a model changes nearly all of them."""


def fingerprint(model: nn.Module, leave_out: Collection[str] = ()) -> dict[str, str]:
    """A short hash of each parameter, the same whether a model was loaded in bfloat16 or its float32 original.

    Args: leave_out: parameters that are not the base model's own (a new head, embeddings of new tokens).
    Collective under ZeRO stage 3.
    """
    samples: dict[str, torch.Tensor] = {}
    # Most weights of a model have the size of others
    drawn = functools.cache(
        lambda numel, device: stratified_positions(0, "fingerprint", numel, min(SAMPLES, numel), device=device)
    )
    for name, parameter in model.named_parameters():
        if name in leave_out:
            continue
        with gathered([parameter]):
            flat = parameter.detach().view(-1)
            if flat.numel():
                sample = flat[drawn(flat.numel(), flat.device)]
                samples[name] = sample.to(torch.bfloat16) if flat.is_floating_point() else sample
    return {name: _hash(sample) for name, sample in samples.items()}


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the parameters that both have, with other values."""
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def _hash(sample: torch.Tensor) -> str:
    return xxhash.xxh32(sample.contiguous().cpu().view(torch.uint8).numpy()).hexdigest()
