"""The layers of bitsandbytes: Linear4bit (nf4 and fp4, scales of blocks) and Linear8bitLt (int8, scales of rows)."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.zero.parameters import is_partitioned


@functools.cache
def _is_a(kind: type[nn.Module], name: str) -> bool:
    """Whether it is a class of bitsandbytes, or a subclass. Asked several times in a layer's step."""
    return any(base.__name__ == name and base.__module__.startswith("bitsandbytes.") for base in kind.__mro__)


class _OfBitsAndBytes(QuantizedLayer):
    class_name: str

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _is_a(type(module), cls.class_name)

    @property
    def _parameter(self) -> nn.Parameter:
        # DeepSpeed takes an access through the module within a forward as a use, and gathers the parameter
        return dict.__getitem__(self.module._parameters, self.name)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.module.out_features, self.module.in_features))

    @property
    def packed(self) -> torch.Tensor:
        return self._parameter.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8)

    def plain(self, weight: torch.Tensor) -> nn.Module:
        layer = super().plain(weight)
        if getattr(self.module, "source_cls", nn.Linear) is not Conv1D:
            return layer
        # transformers quantises the transpose of GPT-2's layers
        with torch.device("meta"):
            transposed = Conv1D(*weight.shape)
        transposed.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        transposed.bias = layer.bias
        return transposed.train(self.module.training)


class FourBits(_OfBitsAndBytes):
    """bitsandbytes.nn.Linear4bit"""

    class_name = "Linear4bit"

    @property
    def _state(self) -> Any:
        """bitsandbytes' QuantState."""
        found = getattr(self._parameter, "quant_state", None)
        return found if found is not None else self.module.quant_state

    @property
    def kind(self) -> str:
        state = self._state
        return f"{state.quant_type}-double" if state.nested else state.quant_type

    @property
    def dtype(self) -> torch.dtype:
        return self._state.dtype

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(self._state)
        # Directly into the dtype of the product, as the product itself does: not rounded twice
        state.dtype = state.dtype if dtype is None else dtype
        # Not a row of bytes (1, n), which would give the transpose
        values = dequantize_4bit(self._parameter.detach().as_subclass(torch.Tensor).view(-1, 1), state)
        return values.view(self.shape)

    def statistics(self) -> Iterator[torch.Tensor]:
        state = self._state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)

    def state(self) -> dict[str, torch.Tensor]:
        values = self._parameter.detach().as_subclass(torch.Tensor)
        return {"weight": values} | {f"weight.{k}": v for k, v in self._state.as_dict(packed=True).items()}

    def identity(self) -> Iterator[torch.Tensor]:
        yield self.packed
        if not self._state.nested:  # else it depends on the order in which a mean was computed
            yield self._state.absmax

    def quantize(self, weight: torch.Tensor) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        module, state = self.module, self._state
        layer = Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=module.compute_dtype,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self._parameter.dtype,
            device="meta",
        )
        packed = Params4bit(
            weight.detach(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self._parameter.dtype,
            module=layer,
        )
        layer.weight = packed.to(weight.device)
        return _like(module, layer)

    def product_is_dequantized(self, inputs: torch.Tensor) -> bool:
        return True

    def product_dtype(self, inputs: torch.Tensor) -> torch.dtype:
        module = self.module
        if not module.compute_type_is_set:
            module.set_compute_type(inputs)
            module.compute_type_is_set = True
        return inputs.dtype if module.compute_dtype is None else module.compute_dtype

    def check_forward(self) -> None:
        dtype, expected = self._parameter.dtype, self.module.quant_storage
        if dtype != expected:
            raise UserError(
                f"the packed 4-bit weights were stored as {expected} and were converted to {dtype}, which destroys "
                f"them: load the model with bnb_4bit_quant_storage={dtype}"
            )

    def check(self) -> None:
        super().check()
        if getattr(self._state, "packing_format_for_cpu", False):
            raise UserError(
                "bitsandbytes has repacked the model's 4-bit weights for inference in its first evaluation, and has "
                "rounded their statistics: load the model again, and call sparsify or load_adapter before you use it"
            )

    def convert_bias(self) -> None:
        module, bias = self.module, self.module._parameters.get("bias")
        if bias is not None and module.compute_type_is_set and module.compute_dtype is not None:
            bias.data = bias.data.to(module.compute_dtype)

    def forbid_repacking(self) -> None:
        """On CPUs with bfloat16 instructions the first evaluation would repack the weight and round its statistics.
        A later training forward of such a layer computes without a gradient."""
        self.module.support_avx512bf16_for_cpu = False

    def allow_repacking(self) -> None:
        from bitsandbytes.functional import has_avx512bf16

        self.module.support_avx512bf16_for_cpu = has_avx512bf16()


class EightBits(_OfBitsAndBytes):
    """bitsandbytes.nn.Linear8bitLt with has_fp16_weights=False"""

    class_name = "Linear8bitLt"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and not module.state.has_fp16_weights

    kind = "int8"
    dtype = torch.float16
    """bitsandbytes rounds a weight to it before it quantises it."""

    @property
    def _scales(self) -> torch.Tensor:
        """float32 (out,): the absolute maximum of each row. The module moves it from the parameter in its first
        forward."""
        scales = self.module.state.SCB
        return self._parameter.SCB if scales is None else scales

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        # In the order of bitsandbytes' own product
        values = self._parameter.detach().as_subclass(torch.Tensor).to(self.dtype if dtype is None else dtype)
        return values.mul_(self._scales.unsqueeze(1).mul(1.0 / 127.0))

    def statistics(self) -> Iterator[torch.Tensor]:
        yield self._scales

    def state(self) -> dict[str, torch.Tensor]:
        return {"weight": self._parameter.detach().as_subclass(torch.Tensor), "SCB": self._scales}

    def identity(self) -> Iterator[torch.Tensor]:
        yield from (self.packed, self._scales)

    def quantize(self, weight: torch.Tensor) -> nn.Module:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        module = self.module
        layer = Linear8bitLt(
            module.in_features,
            module.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=module.state.threshold,
            device="meta",
        )
        packed = Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = packed.to(weight.device)
        return _like(module, layer)

    def product_is_dequantized(self, inputs: torch.Tensor) -> bool:
        return self.module.training and inputs.device.type in ("cpu", "xpu")

    def product_dtype(self, inputs: torch.Tensor) -> torch.dtype:
        return inputs.dtype

    def check_forward(self) -> None:
        state, parameter = self.module.state, self._parameter
        if not is_partitioned(parameter) or hasattr(state, "partitioned_module"):
            return
        if state.SCB is None:
            state.SCB = parameter.SCB
        parameter.CB = parameter.SCB = None
        vars(state).pop("CB", None)
        state.partitioned_module = self.module
        state.__class__ = _state_of_gathered(type(state))


@functools.cache
def _state_of_gathered(kind: type) -> type:
    """bitsandbytes' MatmulLtState of a weight that ZeRO stage 3 partitions. The original keeps the complete weight in
    `CB` besides the parameter; here it is what the parameter contains while it is gathered."""

    def gathered(state: Any) -> torch.Tensor:
        parameter = dict.__getitem__(state.partitioned_module._parameters, EightBits.name)
        return parameter.detach().as_subclass(torch.Tensor)

    return type(kind.__name__, (kind,), {"CB": property(gathered)})


def _like(module: nn.Module, layer: nn.Module) -> nn.Module:
    """Give a new layer what an old one has besides its weight."""
    layer.bias = module._parameters.get("bias")
    if (source := getattr(module, "source_cls", None)) is not None:
        layer.source_cls = source
    return layer.train(module.training)
