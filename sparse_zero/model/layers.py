"""Modules with selected parameters: what leads the gradient to their deltas.

The class of a module that holds such parameters becomes a subclass of what it was, in two ways:
- Reading a selected parameter gives a tensor that leads the gradient to the delta (`read_gradient`). That covers
  every module, and every reader of a parameter; products and lookups have a sampled gradient there too.
- The forward of a linear layer or an embedding yields the gradient at the selected positions alone
  (`_SampledGradient`).
"""

import functools
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from sparse_zero.gradient.sampled import embedding_product, sampled_product
from sparse_zero.model.products import kept_input
from sparse_zero.model.weight import SparseWeight, UpdateClock, scaled
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import is_partitioned, is_whole


class _SampledGradient(torch.autograd.Function):
    """The identity on a module's output; its backward adds the gradient of the delta."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        delta: torch.Tensor,
        module: "SampledModule",
        sparse_weight: SparseWeight,
    ) -> torch.Tensor:
        ctx.module, ctx.sparse_weight, ctx.forwards = module, sparse_weight, sparse_weight.dropping
        ctx.save_for_backward(inputs)
        # Not a view: autograd forbids in-place operations (a ReLU) on views that a Function made. None of the wrapped
        # modules needs its own output in backward, so sharing the memory is safe.
        return output.data

    @staticmethod
    @once_differentiable  # the module itself takes the weight for a constant
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        (inputs,) = ctx.saved_tensors
        weight = ctx.sparse_weight
        # This node runs before the module's own backward, which reads the weight. A stage-3 copy may be gathered anew,
        # without the deltas; any other weight still holds what the forward saw, or autograd refuses it.
        if ctx.module.backward_reads_weight and is_partitioned(weight.weight):
            weight.refresh_copy(ctx.forwards)
        gradient = ctx.module.delta_gradient(inputs, grad_output, weight)
        return grad_output, None, scaled(gradient, weight, ctx.forwards), None, None


class SparseModule:
    """Mixed into the class of a module with selected parameters, which its class reads through properties."""

    plain_class: ClassVar[type[nn.Module]]
    selected_names: ClassVar[frozenset[str]]
    sparse_weights: dict[str, SparseWeight]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        weights = self.sparse_weights.values()
        copies = [w for w in weights if is_partitioned(w.weight) and is_whole(w.weight)]
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(weight.read_once())
            if copies:
                stack.enter_context(_Regathered(copies))
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new_module, (self.plain_class, self.selected_names), self.__dict__


class _Regathered(torch.autograd.graph.saved_tensors_hooks):
    """Keeps stage 3's gathered copies out of the graph, which would hold on to them until backward.

    Of a parameter itself autograd keeps no copy; but what its readers get here is computed.
    """

    def __init__(self, weights: list[SparseWeight]) -> None:
        def pack(tensor: torch.Tensor) -> Any:
            for weight in weights:
                if (start := _start_within(tensor, weight.weight)) is not None:
                    return weight, weight.dropping, tensor.size(), tensor.stride(), start
            return tensor

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            weight, forwards, size, stride, start = packed
            weight.refresh_copy(forwards)
            copy = weight.weight.data
            return copy.as_strided(size, stride, copy.storage_offset() + start)

        super().__init__(pack, unpack)


def _start_within(tensor: torch.Tensor, whole: torch.Tensor) -> int | None:
    """Where a view of `whole` begins in it, in scalars; None of anything else."""
    if tensor.layout != torch.strided or tensor.dtype != whole.dtype or not tensor.numel():
        return None
    start = (tensor.data_ptr() - whole.data_ptr()) // whole.element_size()
    # One storage may hold several gathered parameters
    return start if 0 <= start < whole.numel() else None


class SampledModule(SparseModule):
    """A module whose `weight` is selected, and whose forward tells the gradient at the selected positions."""

    backward_reads_weight: ClassVar[bool] = True

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Of one argument: each of these classes has a name of its own for it."""
        weight = self.sparse_weights["weight"]
        weight.refresh()
        weight.passes_plain = True
        try:
            output = super().forward(*args, **kwargs)
        finally:
            weight.passes_plain = False
        if not weight.trains:
            return output
        (inputs,) = (*args, *kwargs.values())
        return _SampledGradient.apply(output, kept_input(inputs, output), weight.delta, self, weight)


class SparseLinear(SampledModule, nn.Linear):
    """weight (out, in)"""

    @staticmethod
    def delta_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: inputs (..., in), grad_output (..., out). Returns: (n,)"""
        return sampled_product(_flat(grad_output), _flat(inputs), weight.pattern, weight.transient_bytes)


class SparseConv1D(SampledModule, Conv1D):
    """GPT-2's linear layer: weight (in, out)"""

    @staticmethod
    def delta_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: inputs (..., in), grad_output (..., out). Returns: (n,)"""
        return sampled_product(_flat(inputs), _flat(grad_output), weight.pattern, weight.transient_bytes)


class SparseEmbedding(SampledModule, nn.Embedding):
    """weight (rows, columns)"""

    backward_reads_weight = False

    def delta_gradient(self, ids: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: ids (...), grad_output (..., columns). Returns: (n,)"""
        ids, grad_NC, bound = ids.reshape(-1), _flat(grad_output), weight.transient_bytes
        return embedding_product(ids, grad_NC, weight.pattern, bound, self.padding_idx, self.scale_grad_by_freq)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


_SAMPLED = {nn.Linear: SparseLinear, Conv1D: SparseConv1D, nn.Embedding: SparseEmbedding}

# nn.Linear but for its rounding: x @ W.T + b. By name, for to import it takes seconds.
_LINEAR_IN_OTHER_WORDS = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


@functools.cache
def sparse_class(plain: type[nn.Module], names: frozenset[str]) -> type[SparseModule]:
    """What a module of class `plain` becomes when its parameters `names` are selected."""
    sampled = next((base for base in _SAMPLED if issubclass(plain, base)), None) if "weight" in names else None
    if sampled is None:
        bases: tuple[type, ...] = (SparseModule, plain)
    elif plain is sampled:
        bases = (_SAMPLED[sampled],)
    elif plain.forward is sampled.forward or f"{plain.__module__}.{plain.__qualname__}" in _LINEAR_IN_OTHER_WORDS:
        bases = (_SAMPLED[sampled], plain)
    else:
        # Its forward calls that of nn.Linear or nn.Embedding, or reads the weight itself: both are right.
        bases = (plain, _SAMPLED[sampled])
    members = {name: property(functools.partial(_read, name=name)) for name in names}
    members |= {"plain_class": plain, "selected_names": names}
    # DeepSpeed, transformers and others know some classes by their names.
    members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, bases, members)


def _read(module: SparseModule, name: str) -> torch.Tensor:
    return module.sparse_weights[name].read()


def _new_module(plain: type[nn.Module], names: frozenset[str]) -> SparseModule:
    kind = sparse_class(plain, names)
    return kind.__new__(kind)


def attach(target: Target, selection: Selection, clock: UpdateClock, config: SparseConfig) -> SparseWeight:
    """Select scalars of a parameter, in place: every module that holds it becomes a sparse one. `begin` comes next."""
    weight = SparseWeight(target, selection, clock, config)
    for module, name in target.owners:
        weights = module.__dict__.setdefault("sparse_weights", {})
        weights[name] = weight
        module.__class__ = sparse_class(_plain_class(module), frozenset(weights))
    return weight


def detach(weight: SparseWeight) -> None:
    """Turn the modules of a selected parameter back into what they were; it keeps the values that it holds now."""
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
