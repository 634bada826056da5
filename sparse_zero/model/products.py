"""Gradients of the delta for products and lookups with rows of a selected weight.

A product of a batch and a matrix is x @ V with V = W or V = W^T. The gradient of W is x^T @ g or g^T @ x; it is
computed only at the selected positions. With E matrices, each is multiplied with a group of the batch: N / E rows each
(bmm), the rows up to an offset (grouped_mm), or the samples that use this matrix (an expert index per sample).

Shapes: N rows of a batch, S samples, W (R, C), E matrices, n selected scalars.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparse_zero.gradient.sampled import embedding_product, sampled_product
from sparse_zero.model.kept import Key, kept_columns, kept_input
from sparse_zero.model.refusals import refuse_second_derivatives
from sparse_zero.model.row_range import RowRange


@dataclass(frozen=True, eq=False)
class Product:
    """A product of a batch x and a tensor V that shows rows of a weight."""

    row_range: RowRange
    by_transpose: bool = False
    """Whether the product is x @ V^T, as in F.linear, instead of x @ V."""
    is_left: bool = False
    """Whether the weight is the left factor: V @ x, which is (x^T @ V^T)^T."""
    grouping: Literal["even", "ends", "samples"] = "even"
    """How the batch is divided among E matrices."""

    @property
    def _uses_transpose(self) -> bool:
        """Whether x is multiplied with W^T: W itself is shown transposed, or its transpose is used, but not both."""
        return self.row_range.transposed != (self.by_transpose or self.is_left)

    @property
    def _axis(self) -> int | None:
        """The dimension of the weight that x meets; None if x meets only some of it."""
        if self._uses_transpose:
            return -1
        return -2 if self.row_range.is_of_whole_matrices else None

    def kept(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What `gradient` needs of the batch: all, or the drawn columns of the weight."""
        weight = self.row_range.weight
        columns = weight.input_columns(self._axis)
        if columns is None:
            return kept_input(x, output)
        return kept_columns(
            x, output, columns, Key(weight.selection.columns_key, -2 if self.is_left and x.dim() > 1 else -1)
        )

    def gradient(self, x: torch.Tensor, grad_output: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        """Compute the gradient of the delta.

        Args:
            x: what `kept` returned of the batch.
            grad_output: the gradient of the product.
            groups: for grouping "ends" the end of each group, (E,); for "samples" the index of each sample's
                matrix, (S,); None for "even".

        Returns: (n,), at least float32.
        """
        matrices = self.row_range.shape[:-2].numel()
        if self.is_left and x.dim() > 1:
            x, grad_output = x.mT, grad_output.mT
        if self.grouping == "samples":
            order = groups.argsort(stable=True)
            groups = groups.bincount(minlength=matrices).cumsum(0) * x.shape[1]
            x, grad_output = x[order], grad_output[order]
        x, grad_output = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad_output))
        rows, columns = (grad_output, x) if self._uses_transpose else (x, grad_output)
        size = x.shape[0] // matrices
        ends = [size * (i + 1) for i in range(matrices)] if groups is None else groups.tolist()
        bound, first, patterns = self.row_range.weight.transient_bytes, 0, self.row_range.patterns_for(self._axis)
        gradients = (
            (pattern.count, sampled_product(rows[start:end], columns[start:end], pattern, bound))
            for (start, end), pattern in zip(itertools.pairwise([0, *ends]), patterns, strict=True)
        )
        if matrices == 1:
            return next(gradients)[1]
        # Written one by one into the result: torch.cat would need twice the memory
        dtype = torch.promote_types(torch.promote_types(x.dtype, grad_output.dtype), torch.float32)
        result = x.new_empty(self.row_range.delta.numel(), dtype=dtype)
        for count, gradient in gradients:
            result[first : first + count] = gradient
            first += count
        return result


@dataclass(frozen=True, eq=False)
class Lookup:
    """A lookup of rows of a matrix by integer indices, as in F.embedding."""

    row_range: RowRange
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    def kept(self, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What `gradient` needs: the indices."""
        return ids

    def gradient(self, ids: torch.Tensor, grad_output: torch.Tensor, _: None) -> torch.Tensor:
        """Args: ids (...), grad_output (..., C). Returns: (n,)"""
        rows, weight = self.row_range.rows, self.row_range.weight
        padding = None if self.padding_idx is None else self.padding_idx % rows
        ids, grad_NC = ids.reshape(-1) % rows, grad_output.reshape(-1, grad_output.shape[-1])
        if (columns := weight.input_columns(-1)) is not None:
            grad_NC = grad_NC.index_select(1, columns)
        pattern = next(self.row_range.patterns_for(-1, as_matrix=True))
        return embedding_product(ids, grad_NC, pattern, weight.transient_bytes, padding, self.scale_grad_by_freq)


class SampledGradient(torch.autograd.Function):
    """The identity on the result of a product or lookup, whose backward also returns the gradient of the delta."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        groups: torch.Tensor | None,
        delta: torch.Tensor,
        use: Product | Lookup,
    ) -> torch.Tensor:
        ctx.use = use
        ctx.save_for_backward(inputs, groups)
        # Not a view: autograd forbids in-place operations (adding a bias) on views that a Function returns. Sharing
        # memory is safe because none of these functions needs its own result in backward.
        return output.data

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        refuse_second_derivatives(ctx.use.row_range.weight.selection.name)
        inputs, groups = ctx.saved_tensors
        gradient = ctx.use.gradient(inputs, grad_output, groups)
        return grad_output, None, None, gradient, None
