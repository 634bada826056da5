"""The bytes of quantised weights, before they exist: packed values, and the statistics to dequantise them."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_zero.data.quantization import check_trainable, completed, from_transformers, is_quantized
from sparse_zero.quantized.methods import TORCHAO, own_quantization
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.recipe.recipe import Recipe

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Scalars with one scale, and scales with one scale of double quantisation, in bitsandbytes."""

SCALE_OF_INT8, ZERO_POINT = 4, 1
"""Bytes for each row of an 8-bit weight; torchao has zero points, also where they are all 0."""

CODE_OF_4_BITS, CODE_OF_SCALES, OFFSET = 16 * 4, 256 * 4, 4
"""Bytes of the tables that each 4-bit weight has: its values, those of its scales, and the mean of these."""


@dataclass(frozen=True)
class QuantizedSizes:
    """The quantised weights of a model."""

    quantization: Quantization
    shapes: dict[str, tuple[int, int]]
    """(out, in) by parameter name."""

    def packed(self, name: str) -> int:
        """Bytes of the packed values of a weight."""
        rows, columns = self.shapes[name]
        return -(-rows * columns * self.quantization.bits // 8)

    def statistics(self, name: str) -> int:
        """Bytes of the statistics of a weight."""
        rows, columns = self.shapes[name]
        if self.quantization.kind == "int8":
            return SCALE_OF_INT8 * rows
        if self.quantization.package == TORCHAO:
            return (SCALE_OF_INT8 + ZERO_POINT) * rows * (columns // (self.quantization.group_size or columns))
        scales = -(-rows * columns // BLOCK)
        if not self.quantization.bnb_4bit_use_double_quant:
            return 4 * scales + CODE_OF_4_BITS
        return scales + 4 * -(-scales // BLOCK_OF_SCALES) + CODE_OF_4_BITS + CODE_OF_SCALES + OFFSET

    @property
    def scalars(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def packed_bytes(self) -> int:
        return sum(map(self.packed, self.shapes))

    @property
    def statistics_bytes(self) -> int:
        return sum(map(self.statistics, self.shapes))

    @property
    def largest(self) -> int:
        """Scalars of the largest weight, of which a product makes a dequantised copy."""
        return max((rows * columns for rows, columns in self.shapes.values()), default=0)

    @property
    def bits(self) -> float:
        """Bits of a quantised scalar, with the statistics."""
        return 8 * (self.packed_bytes + self.statistics_bytes) / max(1, self.scalars)

    @property
    def notes(self) -> list[str]:
        """What a plan does not say in its tables."""
        if self.quantization.package == TORCHAO:
            return ["stage 3: ZeRO cannot partition weights of torchao: nf4, fp4 and int8 it can"]
        return ["stage 3: each rank loads the whole quantised base model before DeepSpeed partitions it"]


def quantized_sizes(
    recipe: Recipe, config: PreTrainedConfig, model: PreTrainedModel, dtype: torch.dtype
) -> QuantizedSizes | None:
    """The quantised weights of a recipe's base model; None if it is not quantised.

    Args:
        config: the base model's.
        model: the base model on the meta device.
        dtype: of its other weights.

    Raises UserError: the base model cannot be trained, see `check_trainable`.
    """
    section = recipe.model
    own = own_quantization(config)
    if own is None and section.quantization is None:
        return None
    check_trainable(section.source, config, section.quantization, anywhere=True)
    known = section.quantization if own is None else from_transformers(own)
    quantization = completed(known, model, recipe.sparse, dtype)
    others = () if quantization.package == TORCHAO else Conv1D
    shapes = {}
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, others)) and is_quantized(name, quantization):
            shapes[f"{name}.weight"] = tuple(module.weight.shape)
    return QuantizedSizes(quantization, shapes)
