"""Sparse modules: subclasses that compute the gradients of the deltas.

A module with selected parameters gets a subclass of its own class, which does two things:
- An access to a selected parameter returns a tensor whose graph includes the delta (see `weight_tensor`). This works
  for any module and any use of the parameter; products and lookups get a sampled gradient.
- The forward of a linear layer or an embedding computes the gradient only at the selected positions
  (`_SampledGradient`).
"""

import functools
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.gradient.sampled import embedding_product, sampled_product
from sparse_zero.model.products import kept_input
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight import SparseWeight, scaled
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import is_partitioned, is_whole


class _SampledGradient(torch.autograd.Function):
    """The identity on a module's output, whose backward also returns the gradient of the delta."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        delta: torch.Tensor,
        module: "SampledModule",
        sparse_weight: SparseWeight,
    ) -> torch.Tensor:
        ctx.module, ctx.sparse_weight, ctx.dropout_step = module, sparse_weight, sparse_weight.dropout_step
        ctx.save_for_backward(inputs)
        # Not a view: autograd forbids in-place operations (a ReLU) on views that a Function returns. Sharing memory is
        # safe because none of the wrapped modules needs its own output in backward.
        return output.data

    @staticmethod
    @once_differentiable  # the module treats the weight as a constant
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        (inputs,) = ctx.saved_tensors
        weight = ctx.sparse_weight
        # This node runs before the module's own backward, which reads the weight. ZeRO stage 3 may have gathered the
        # weight again, without the deltas. Other weights are unchanged since the forward, or autograd raises an error.
        if ctx.module.backward_reads_weight and is_partitioned(weight.weight):
            weight.refresh_copy(ctx.dropout_step)
        gradient = ctx.module.delta_gradient(inputs, grad_output, weight)
        return grad_output, None, scaled(gradient, weight, ctx.dropout_step), None, None


class SparseModule:
    """A mixin for modules with selected parameters. Each of these parameters is read through a property."""

    plain_class: ClassVar[type[nn.Module]]
    """The original class of the module."""
    selected_names: ClassVar[frozenset[str]]
    """Names of the selected parameters within the module."""
    sparse_weights: dict[str, SparseWeight]
    """The selected parameters by these names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        weights = self.sparse_weights.values()
        copies = [w for w in weights if is_partitioned(w.weight) and is_whole(w.weight)]
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(weight.share_reads())
            if copies:
                stack.enter_context(_SavedByReference(copies))
            return super().forward(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        # Replicas have tensors instead of parameters, and would share one set of deltas
        raise UserError(
            "nn.DataParallel cannot run a sparse model on several devices: use DistributedDataParallel, with a "
            "process for each"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new_module, (self.plain_class, self.selected_names), self.__getstate__()


class _SavedByReference(torch.autograd.graph.saved_tensors_hooks):
    """Saves a reference for backward instead of the weight that ZeRO stage 3 gathered, so that it can be freed.

    Autograd saves a parameter by reference, but here the module reads a computed tensor instead of the parameter.
    """

    def __init__(self, weights: list[SparseWeight]) -> None:
        def pack(tensor: torch.Tensor) -> Any:
            for weight in weights:
                if (offset := _offset_in(weight.weight, tensor)) is not None:
                    return weight, weight.dropout_step, tensor.size(), tensor.stride(), offset
            return tensor

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            weight, dropout_step, size, stride, offset = packed
            weight.refresh_copy(dropout_step)
            copy = weight.weight.data
            return copy.as_strided(size, stride, copy.storage_offset() + offset)

        super().__init__(pack, unpack)


def _offset_in(weight: torch.Tensor, tensor: torch.Tensor) -> int | None:
    """The offset of a view of `weight` within it, in scalars. None if `tensor` is not such a view."""
    if tensor.layout != torch.strided or tensor.dtype != weight.dtype or not tensor.numel():
        return None
    offset = (tensor.data_ptr() - weight.data_ptr()) // weight.element_size()
    # Storages are not compared: one storage may contain several gathered parameters
    return offset if 0 <= offset < weight.numel() else None


class SampledModule(SparseModule):
    """A module whose `weight` is selected and whose forward computes the gradient at the selected positions."""

    backward_reads_weight: ClassVar[bool] = True

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Run the module on its single argument, which has a different name in each of these classes."""
        weight = self.sparse_weights["weight"]
        weight.refresh()
        weight.reads_plain = True
        try:
            output = super().forward(*args, **kwargs)
        finally:
            weight.reads_plain = False
        if not weight.trains:
            return output
        (inputs,) = (*args, *kwargs.values())
        return _SampledGradient.apply(output, kept_input(inputs, output), weight.delta, self, weight)


class SparseLinear(SampledModule, nn.Linear):
    """nn.Linear with a selected weight (out, in)."""

    @staticmethod
    def delta_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: inputs (..., in), grad_output (..., out). Returns: (n,)"""
        return sampled_product(_flat(grad_output), _flat(inputs), weight.pattern, weight.transient_bytes)


class SparseConv1D(SampledModule, Conv1D):
    """GPT-2's linear layer with a selected weight (in, out)."""

    @staticmethod
    def delta_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: inputs (..., in), grad_output (..., out). Returns: (n,)"""
        return sampled_product(_flat(inputs), _flat(grad_output), weight.pattern, weight.transient_bytes)


class SparseEmbedding(SampledModule, nn.Embedding):
    """nn.Embedding with a selected weight (rows, columns)."""

    backward_reads_weight = False

    def delta_gradient(self, ids: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: ids (...), grad_output (..., columns). Returns: (n,)"""
        ids, grad_NC, bound = ids.reshape(-1), _flat(grad_output), weight.transient_bytes
        return embedding_product(ids, grad_NC, weight.pattern, bound, self.padding_idx, self.scale_grad_by_freq)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


_SAMPLED = {nn.Linear: SparseLinear, Conv1D: SparseConv1D, nn.Embedding: SparseEmbedding}

# Same as nn.Linear except for rounding: x @ W.T + b. By name because the import takes seconds.
_EQUIVALENT_TO_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


@functools.cache
def sparse_class(plain: type[nn.Module], names: frozenset[str]) -> type[SparseModule]:
    """The subclass of `plain` for a module whose parameters `names` are selected."""
    sampled = next((base for base in _SAMPLED if issubclass(plain, base)), None) if "weight" in names else None
    if sampled is None:
        bases: tuple[type, ...] = (SparseModule, plain)
    elif plain is sampled:
        bases = (_SAMPLED[sampled],)
    elif plain.forward is sampled.forward or f"{plain.__module__}.{plain.__qualname__}" in _EQUIVALENT_TO_LINEAR:
        bases = (_SAMPLED[sampled], plain)
    else:
        # Its forward may call that of nn.Linear or nn.Embedding, or read the weight itself. Both give right gradients.
        bases = (plain, _SAMPLED[sampled])
    members = {name: property(functools.partial(_read, name=name)) for name in names}
    members |= {"plain_class": plain, "selected_names": names}
    # DeepSpeed, transformers and other libraries compare names of classes
    members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, bases, members)


def _read(module: SparseModule, name: str) -> torch.Tensor:
    return module.sparse_weights[name].read()


def _new_module(plain: type[nn.Module], names: frozenset[str]) -> SparseModule:
    kind = sparse_class(plain, names)
    return kind.__new__(kind)


def attach(target: Target, selection: Selection, counter: StepCounter, config: SparseConfig) -> SparseWeight:
    """Select scalars of a parameter, in place. Each module that owns the parameter becomes a sparse module.

    Call `initialize` of the returned weight next.
    """
    weight = SparseWeight(target, selection, counter, config)
    for module, name in target.owners:
        weights = module.__dict__.setdefault("sparse_weights", {})
        weights[name] = weight
        module.__class__ = sparse_class(_plain_class(module), frozenset(weights))
    return weight


def detach(weight: SparseWeight) -> None:
    """Give the modules of a selected parameter their original classes. The parameter keeps its current values."""
    weight.remove()
    for module, name in weight.owners:
        del module.sparse_weights[name]
        plain = _plain_class(module)
        if module.sparse_weights:
            module.__class__ = sparse_class(plain, frozenset(module.sparse_weights))
        else:
            del module.sparse_weights
            module.__class__ = plain


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return module.plain_class if isinstance(module, SparseModule) else type(module)
