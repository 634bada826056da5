"""What torch.compile traces instead of the eager forward: tensor operations only, without a graph break.

The weights have their deltas already: they are written when an optimizer steps, not in the forward. A product or a
lookup has a node in the graph whose backward calls the operator `sparse_zero::delta_gradient`; any other reader one
that calls `sparse_zero::selected`, with a dense gradient of the weight. Both get the weight by a number, because an
operator takes only tensors and numbers.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model.setting import Setting


class CompiledWeight(Protocol):
    """The part of `model.weight.SparseWeight` that this module uses."""

    owners: tuple[tuple[nn.Module, str], ...]
    weight: nn.Parameter
    is_attached: bool
    delta: nn.Parameter

    def flat_positions(self) -> torch.Tensor: ...
    def scaled(self, gradient: torch.Tensor, setting: Setting) -> torch.Tensor: ...


_WEIGHTS: weakref.WeakValueDictionary[int, CompiledWeight] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(weight: CompiledWeight) -> int:
    """Register a weight.

    Returns: its number, which is valid in this process.
    """
    number = next(_numbers)
    _WEIGHTS[number] = weight
    return number


def sparse_weights() -> list[CompiledWeight]:
    """All selected weights of this process."""
    return list(_WEIGHTS.values())


def refuse(name: str, dropout: float, is_quantized: bool) -> None:
    """Raise UserError for what only an eager forward does.

    Args:
        name: of the model.
        dropout: of the deltas, whose mask is drawn in each forward.
        is_quantized: whether scalars of quantised weights are trained.
    """
    if is_quantized:
        raise UserError(f"{name}: a sparse model with a quantised base cannot be compiled: leave out torch.compile")
    if dropout:
        raise UserError(f"{name}: sparse.dropout cannot be compiled: set it to 0, or do not use torch.compile")


class SampledGradient(torch.autograd.Function):
    """The identity on a module's output, whose backward also returns the gradient of the delta."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        delta: torch.Tensor,
        number: int,
        owner: int,
        scale: str,
    ) -> torch.Tensor:
        """Args:
        owner: the index of the module among the weight's owners.
        scale: that of the forward, as a text; it may be another when backward runs. torch.compile makes a
            variable of a number that changes, which such a Function cannot keep.
        """
        ctx.save_for_backward(inputs)
        ctx.number, ctx.owner, ctx.scale = number, owner, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        (inputs,) = ctx.saved_tensors
        gradient = torch.ops.sparse_zero.delta_gradient(inputs, grad_output, ctx.number, ctx.owner, ctx.scale)
        return grad_output, None, gradient, None, None, None


class Read(torch.autograd.Function):
    """The weight, whose backward selects the gradient of the delta from the dense gradient."""

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, values: torch.Tensor, number: int, scale: str) -> torch.Tensor:
        ctx.number, ctx.scale = number, scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return torch.ops.sparse_zero.selected(grad, ctx.number, ctx.scale), None, None, None


@torch.library.custom_op("sparse_zero::delta_gradient", mutates_args=())
def _delta_gradient(
    inputs: torch.Tensor, grad_output: torch.Tensor, number: int, owner: int, scale: str
) -> torch.Tensor:
    weight = _WEIGHTS[number]
    module, _ = weight.owners[owner]
    return weight.scaled(module.delta_gradient(inputs, grad_output, weight), Setting(True, float(scale), None))


@_delta_gradient.register_fake
def _(inputs: torch.Tensor, grad_output: torch.Tensor, number: int, owner: int, scale: str) -> torch.Tensor:
    return _like_delta(grad_output, number)


@torch.library.custom_op("sparse_zero::selected", mutates_args=())
def _selected(grad: torch.Tensor, number: int, scale: str) -> torch.Tensor:
    weight = _WEIGHTS[number]
    return weight.scaled(grad.reshape(-1).index_select(0, weight.flat_positions()), Setting(True, float(scale), None))


@_selected.register_fake
def _(grad: torch.Tensor, number: int, scale: str) -> torch.Tensor:
    return _like_delta(grad, number)


def _like_delta(grad: torch.Tensor, number: int) -> torch.Tensor:
    delta = _WEIGHTS[number].delta
    return grad.new_empty(delta.numel(), dtype=delta.dtype)
