"""The linear layers of torchao: an nn.Linear whose weight is a subclass of a tensor, which contains the packed one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.quantized.names import NOT_PARTITIONED


class Int8WeightOnly(QuantizedLayer):
    """A layer of torchao's Int8WeightOnlyConfig: int8 values (out, in), with a scale for each row, for each group of a
    row, or for the whole weight."""

    is_subclassed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        weight = dict.get(module._parameters, cls.name)
        kind = type(weight)
        if kind.__name__ != "Int8Tensor" or not kind.__module__.startswith("torchao."):
            return False
        # Else the layer's product also rounds or scales the inputs
        return weight.act_quant_kwargs is None and weight.act_pre_scale is None

    @property
    def _weight(self) -> Any:
        """torchao's Int8Tensor."""
        return dict.__getitem__(self.module._parameters, self.name)

    @property
    def _group(self) -> int | None:
        """The scalars of a row with one scale; None if it is the row, 0 if all rows have one."""
        rows, columns = self._weight.block_size
        return 0 if rows > 1 else columns if columns < self.shape[1] else None

    @property
    def kind(self) -> str:
        group = self._group
        return "int8_weight_only" if group is None else f"int8_weight_only-{group or 'tensor'}"

    @property
    def shape(self) -> torch.Size:
        return self._weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._weight.dequantize(self.dtype if dtype is None else dtype)

    @property
    def packed(self) -> torch.Tensor:
        return self._weight.qdata.reshape(-1).view(torch.uint8)

    @property
    def packed_bytes(self) -> int:
        return self._weight.qdata.numel()

    def statistics(self) -> Iterator[torch.Tensor]:
        yield self._weight.scale
        if self._weight.zero_point is not None:
            yield self._weight.zero_point

    def state(self) -> dict[str, torch.Tensor]:
        return {self.name: self._weight.detach()}

    def is_equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if type(one) is not type(other) or one.block_size != other.block_size:
            return False
        pairs = [(getattr(one, name), getattr(other, name)) for name in ("qdata", "scale", "zero_point")]
        return all((a is b is None) or super(Int8WeightOnly, self).is_equal(a, b) for a, b in pairs)

    def identity(self) -> Iterator[torch.Tensor]:
        yield self.packed
        yield from self.statistics()

    def quantize(self, weight: torch.Tensor) -> nn.Module:
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, PerTensor, quantize_

        group = self._group
        granularity = PerRow() if group is None else PerGroup(group) if group else PerTensor()
        layer = self.plain(weight.to(self.dtype))
        quantize_(layer, Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))
        return layer

    def product_is_dequantized(self, inputs: torch.Tensor) -> bool:
        # It multiplies by the scales after the product, which is rounded in another way
        return False

    def product_dtype(self, inputs: torch.Tensor) -> torch.dtype:
        return inputs.dtype

    def check(self) -> None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        super().check()
        if is_deepspeed_zero3_enabled():
            raise UserError(NOT_PARTITIONED)
