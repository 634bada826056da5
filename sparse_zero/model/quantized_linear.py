"""The layer of a quantised weight of which scalars are trained: y = Q(x) + x[:, columns] D^T.

Q is the layer's own product, and D (out, K) has the deltas in the K drawn columns; backward keeps x[:, columns]. If
scalars are drawn from the whole weight, the product is that of a dequantised copy with the deltas at the positions,
where the layer's own product makes such a copy too. The copy is not kept: backward makes it again for the gradient of
the input.

Shapes: x (N, in), y (N, out), K drawn columns, n selected scalars.
"""

from typing import Any

import torch
import torch.nn.functional as F

from sparse_zero.gradient.sampled import sampled_product
from sparse_zero.model.kept import Key, kept_columns, kept_input
from sparse_zero.model.quantized_weight import QuantizedWeight
from sparse_zero.model.refusals import refuse_second_derivatives, refuse_transforms
from sparse_zero.model.setting import Setting
from sparse_zero.model.sparse_module import SparseModule


class QuantizedLinear(SparseModule):
    """A quantised linear layer with a selected weight."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Run the layer on its single argument."""
        (inputs,) = (*args, *kwargs.values())
        weight: QuantizedWeight = self.sparse_weights["weight"]
        weight.layer.check_forward()
        setting = weight.setting
        if not (setting.enabled or setting.is_reference):
            return super().forward(inputs)
        if weight.trains:
            refuse_transforms(weight.selection.name)
        return _Product.apply(inputs, weight.delta, self.bias, self, weight, setting)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict, *others: Any) -> None:
        """The base of the state dict is that of the layer, or `refusal_of` refuses it: only the deltas are loaded."""
        layer = self.sparse_weights["weight"].layer
        base = {f"{prefix}{name}" for name in layer.state()} | {f"{prefix}weight_format"}
        _, missing, *_ = others
        super()._load_from_state_dict(
            {key: value for key, value in state.items() if key not in base}, prefix, metadata, *others
        )
        if prefix + layer.name in state and prefix + layer.name in missing:
            missing.remove(prefix + layer.name)


class _Product(torch.autograd.Function):
    """The product of a layer and its deltas."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        delta: torch.Tensor,
        bias: torch.Tensor | None,
        module: QuantizedLinear,
        weight: QuantizedWeight,
        setting: Setting,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.setting, ctx.seen = weight, setting, weight.delta_state()
        ctx.dtype = _product_dtype(weight, inputs)
        # The reference is not trained
        trains = ctx.needs_input_grad[1] and setting.enabled
        output, kept = _product(inputs, bias, module, weight, setting, trains)
        ctx.trains, ctx.input_dtype = trains, inputs.dtype
        if trains:
            ctx.save_for_backward(kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple:
        if grad_output is None:
            return (None,) * 6
        weight: QuantizedWeight = ctx.weight
        refuse_second_derivatives(weight.selection.name)
        weight.check_not_plain()
        if not weight.is_partitioned:
            weight.check_delta_state(ctx.seen)
        grad_NO = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_delta = grad_bias = None
        if ctx.needs_input_grad[0]:
            values = weight.layer.dequantized(ctx.dtype)
            weight.add_to(values, weight.added(ctx.setting))
            grad_input = (grad_NO.to(ctx.dtype) @ values).to(ctx.input_dtype)
            grad_input = grad_input.view(*grad_output.shape[:-1], values.shape[1])
            del values
        if ctx.trains:
            (kept,) = ctx.saved_tensors
            kept_NK = kept.reshape(-1, kept.shape[-1])
            gradient = sampled_product(grad_NO, kept_NK, weight.pattern_for(-1), weight.transient_bytes)
            grad_delta = weight.scaled(gradient, ctx.setting)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0)
        return grad_input, grad_delta, grad_bias, None, None, None


def _product(
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
    module: QuantizedLinear,
    weight: QuantizedWeight,
    setting: Setting,
    keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and what backward needs of the input: x[:, columns], or all of it; None if it is not kept."""
    added, columns, layer = weight.added(setting), weight.input_columns(-1), weight.layer
    if columns is None and layer.product_is_dequantized(inputs):
        dtype = layer.product_dtype(inputs)
        values = layer.dequantized(dtype)
        weight.add_to(values, added)
        output = F.linear(inputs.to(dtype), values, None if bias is None else bias.to(dtype)).to(inputs.dtype)
        return output, kept_input(inputs, output) if keeps else None
    output = module.plain_class.forward(module, inputs)
    if columns is None:
        used = kept_input(inputs, output)
    else:
        used = kept_columns(inputs, output, columns, Key(weight.selection.columns_key, -1))
    matrix = weight.added_matrix(added, output.dtype)
    # In place: no second output
    output.view(-1, output.shape[-1]).addmm_(used.reshape(-1, used.shape[-1]).to(output.dtype), matrix.T)
    return output, used if keeps else None


def _product_dtype(weight: QuantizedWeight, inputs: torch.Tensor) -> torch.dtype:
    """The dtype in which the product with the weight is computed."""
    dtype, device = weight.layer.product_dtype(inputs), inputs.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype
