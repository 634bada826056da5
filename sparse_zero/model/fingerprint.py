"""The fingerprint of a base model: a hash of a few scalars of each parameter. It detects another base model."""

import functools
from collections.abc import Collection

import torch
import xxhash
from torch import nn

from sparse_zero.model.flat_view import FlatView
from sparse_zero.quantized.formats import kinds, quantized_layers
from sparse_zero.selection.draws import stratified_positions
from sparse_zero.selection.unsupported import has_plain_values
from sparse_zero.zero.parameters import gathered

SAMPLES_PER_PARAMETER = 64
"""Few are enough: fine-tuning changes nearly all scalars of a model."""


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> dict[str, str]:
    """Hash each parameter of a base model.

    The samples are rounded to bfloat16 first, so that a float32 model and its bfloat16 copy have the same hashes.
    Of a quantised weight the packed bytes are hashed.
    Under ZeRO stage 3, all ranks must call it.

    Args:
        model: the base model.
        exclude: names of parameters that do not come from the base model (a new head, embeddings of new tokens).

    Returns: 32-bit hexadecimal hashes by parameter name.
    """
    samples: dict[str, torch.Tensor] = {}
    # Cached because many weights have the same size
    sampled_positions = functools.cache(
        lambda numel, device: stratified_positions(
            0, "fingerprint", numel, min(SAMPLES_PER_PARAMETER, numel), device=device
        )
    )
    # The weights of files have no modules
    packed = dict(quantized_layers(model)) if isinstance(model, nn.Module) else {}
    for name, parameter in model.named_parameters():
        # Sharded parameters, and those of unknown quantizers, have no scalars of the base model that could be compared
        if name in exclude or not (name in packed or has_plain_values(parameter)):
            continue
        with gathered([parameter]):
            if name in packed:
                parts = [
                    FlatView(tensor).read(sampled_positions(tensor.numel(), tensor.device))
                    for tensor in packed[name].identity()
                ]
                samples[name] = torch.cat([_bytes(part) for part in parts])
                continue
            numel, device = parameter.numel(), parameter.device
            if numel:
                sample = FlatView(parameter.detach()).read(sampled_positions(numel, device))
                samples[name] = sample.to(torch.bfloat16) if parameter.is_floating_point() else sample
    return {name: _hash(sample) for name, sample in samples.items()}


def base_dtype(model: nn.Module, names: Collection[str]) -> torch.dtype:
    """The dtype of a base model: that of the first of its parameters `names`, or of the first parameter that is not
    quantised if all of them are."""
    parameters, packed = dict(model.named_parameters()), kinds(model)
    of_names = [parameters[name] for name in names if name in parameters and name not in packed]
    others = [p for name, p in parameters.items() if p.is_floating_point() and name not in packed]
    return next((parameter.dtype for parameter in (*of_names, *others)), torch.float32)


def differing_parameters(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the parameters that are in both fingerprints with different hashes."""
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def _bytes(sample: torch.Tensor) -> torch.Tensor:
    return (sample.to(torch.bfloat16) if sample.is_floating_point() else sample).contiguous().view(torch.uint8)


def _hash(sample: torch.Tensor) -> str:
    return xxhash.xxh32(sample.contiguous().cpu().view(torch.uint8).numpy()).hexdigest()
