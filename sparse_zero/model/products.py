"""Products with rows of a selected weight: the gradient of the delta beside the function's own result.

A batch times a matrix is x @ V with V = W or V = W^T; the gradient of W is x^T @ g or g^T @ x, of which the selected
positions alone are computed. Where there are E matrices, each takes a part of the batch: as many rows each (bmm), the
rows up to an offset (grouped_mm), or the samples that have gathered it.

Shapes: N rows of a batch, W (R, C), E matrices, n selected scalars.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from sparse_zero.gradient.sampled import embedding_product, sampled_product
from sparse_zero.model.row_range import RowRange


@dataclass(frozen=True, eq=False)
class Product:
    """How a batch x meets a weight.

    `gradient` takes x, what has arrived for the product, and what parts the batch (None: as many rows for each):
    the ends of the parts, (E,), or the matrix of each sample, (S,). It returns (n,).
    """

    rows_shown: RowRange
    by_rows: bool = False
    """Whether it is x @ shown^T, as in F.linear, and not x @ shown."""
    is_left: bool = False
    """Whether the weight comes first: shown @ x, which is (x^T @ shown^T)^T."""
    parts: Literal["even", "ends", "samples"] = "even"

    def gradient(self, x: torch.Tensor, grad_output: torch.Tensor, parting: torch.Tensor | None) -> torch.Tensor:
        matrices = self.rows_shown.shape[:-2].numel()
        if self.is_left and x.dim() > 1:
            x, grad_output = x.mT, grad_output.mT
        if self.parts == "samples":
            order = parting.argsort(stable=True)
            parting = parting.bincount(minlength=matrices).cumsum(0) * x.shape[1]
            x, grad_output = x[order], grad_output[order]
        x, grad_output = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad_output))
        # W itself is what x meets where it is seen as it is, or turned twice
        turned = self.rows_shown.transposed != (self.by_rows or self.is_left)
        rows, columns = (grad_output, x) if turned else (x, grad_output)
        each = x.shape[0] // matrices
        ends = [each * (i + 1) for i in range(matrices)] if parting is None else parting.tolist()
        bound, first = self.rows_shown.weight.transient_bytes, 0
        gradients = (
            (pattern.count, sampled_product(rows[start:end], columns[start:end], pattern, bound))
            for (start, end), pattern in zip(itertools.pairwise([0, *ends]), self.rows_shown.patterns(), strict=True)
        )
        if matrices == 1:
            return next(gradients)[1]
        # One after the other into their places: to keep all and join them would take as much again
        dtype = torch.promote_types(torch.promote_types(x.dtype, grad_output.dtype), torch.float32)
        result = x.new_empty(self.rows_shown.change.numel(), dtype=dtype)
        for count, gradient in gradients:
            result[first : first + count] = gradient
            first += count
        return result


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of a matrix, looked up by a tensor of integers."""

    rows_shown: RowRange
    padding_idx: int | None = None
    by_frequency: bool = False

    def gradient(self, ids: torch.Tensor, grad_output: torch.Tensor, _: None) -> torch.Tensor:
        """Args: ids (...), grad_output (..., C). Returns: (n,)"""
        rows, bound = self.rows_shown.rows, self.rows_shown.weight.transient_bytes
        padding = None if self.padding_idx is None else self.padding_idx % rows
        ids, grad_NC = ids.reshape(-1) % rows, grad_output.reshape(-1, grad_output.shape[-1])
        return embedding_product(ids, grad_NC, self.rows_shown.pattern(), bound, padding, self.by_frequency)


def kept_input(inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What a product's backward needs of its input: under autocast, what it was made to before it was used."""
    if not inputs.is_floating_point() or inputs.element_size() <= output.element_size():
        return inputs
    if inputs.is_leaf:  # an optimizer may change it unseen
        return inputs.detach().to(output.dtype)
    # On the tensor itself: several layers of one input keep one copy
    state, kept = getattr(inputs, "_sparse_zero_kept", (None, None))
    if state != (inputs._version, output.dtype):
        state, kept = (inputs._version, output.dtype), inputs.detach().to(output.dtype)
        inputs._sparse_zero_kept = state, kept
    return kept


class SampledUse(torch.autograd.Function):
    """The identity on the result of a use of the weight; its backward adds the gradient of the delta."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        parting: torch.Tensor | None,
        change: torch.Tensor,
        use: Product | Lookup,
    ) -> torch.Tensor:
        ctx.use = use
        ctx.save_for_backward(inputs, parting)
        # Not a view: autograd forbids in-place operations (adding a bias) on views that a Function made. None of these
        # functions needs its own result in backward, so sharing the memory is safe.
        return output.data

    @staticmethod
    @once_differentiable  # the function itself takes the weight for a constant
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        inputs, parting = ctx.saved_tensors
        gradient = ctx.use.gradient(inputs, grad_output, parting)
        return grad_output, None, None, gradient, None
