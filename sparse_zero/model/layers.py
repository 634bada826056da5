"""Sparse modules: subclasses that compute the gradients of the deltas.

A module with selected parameters gets a subclass of its own class, which does two things:
- An access to a selected parameter returns a tensor whose graph includes the delta (see `weight_tensor`). This works
  for any module and any use of the parameter; products and lookups get a sampled gradient.
- The forward of a linear layer or an embedding computes the gradient only at the selected positions
  (`_SampledGradient`).
"""

import functools
import types
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.gradient.sampled import embedding_product, sampled_product
from sparse_zero.model import compiled, reads
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.kept import Key, kept_columns, kept_input
from sparse_zero.model.quantized_linear import QuantizedLinear
from sparse_zero.model.refusals import refuse_second_derivatives, refuse_transforms
from sparse_zero.model.sparse_module import SparseModule
from sparse_zero.model.weight import SparseWeight
from sparse_zero.zero.parameters import is_partitioned


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
        ctx.sparse_weight, ctx.setting = sparse_weight, sparse_weight.setting
        # The module may be plain when backward runs, with another adapter
        ctx.delta_gradient = module.delta_gradient
        ctx.save_for_backward(inputs)
        ctx.set_materialize_grads(False)
        # Not a view: autograd forbids in-place operations (a ReLU) on views that a Function returns. Sharing memory is
        # safe because none of the wrapped modules needs its own output in backward.
        return output.data

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple:
        weight = ctx.sparse_weight
        if grad_output is None:
            return None, None, None, None, None
        refuse_second_derivatives(weight.selection.name)
        weight.check_not_plain()
        (inputs,) = ctx.saved_tensors
        gradient = ctx.delta_gradient(inputs, grad_output, weight)
        return grad_output, None, weight.scaled(gradient, ctx.setting), None, None

    @staticmethod
    def jvp(ctx: Any, output: torch.Tensor, inputs: Any, delta: torch.Tensor | None, *_: Any) -> torch.Tensor:
        """Forward mode: the tangent of the output, in which a tangent of the delta would be missing."""
        if delta is not None:
            name = ctx.sparse_weight.selection.name
            raise UserError(f"{name}: forward-mode derivatives of deltas are not supported")
        return output


class SampledModule(SparseModule):
    """A module whose `weight` is selected and whose forward computes the gradient at the selected positions."""

    axis: ClassVar[int | None]
    """The dimension of the weight that the input meets in a product."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Run the module on its single argument, which has a different name in each of these classes."""
        weight = self.sparse_weights["weight"]
        if torch.compiler.is_compiling() and not is_partitioned(self._parameters["weight"]):
            return self._compiled(weight, *args, **kwargs)
        weight.refresh()
        with reads.plain(weight):
            output = super().forward(*args, **kwargs)
        if not weight.trains:
            return output
        refuse_transforms(weight.selection.name)
        (inputs,) = (*args, *kwargs.values())
        return _SampledGradient.apply(output, self._kept(inputs, output, weight), weight.delta, self, weight)

    def _kept(self, inputs: torch.Tensor, output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """What `delta_gradient` needs of the input."""
        columns = weight.input_columns(self.axis)
        if columns is None:
            return kept_input(inputs, output)
        return kept_columns(inputs, output, columns, Key(weight.selection.columns_key, -1))

    def _compiled(self, weight: SparseWeight, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The forward that torch.compile traces."""
        (inputs,) = (*args, *kwargs.values())
        output = self.product(inputs, self._parameters["weight"])
        delta = self._parameters[self.delta_names["weight"]]
        if not (weight.enabled and torch.is_grad_enabled() and delta.requires_grad):
            return output
        if (columns := weight.input_columns(self.axis)) is not None:
            inputs = inputs.detach().index_select(-1, columns)
        if inputs.is_floating_point() and inputs.element_size() > output.element_size():
            inputs = inputs.to(output.dtype)
        owner = self.owner_indices["weight"]
        return compiled.SampledGradient.apply(output, inputs, delta, weight.number, owner, weight.scale_text)


class SparseLinear(SampledModule, nn.Linear):
    """nn.Linear with a selected weight (out, in)."""

    axis = -1

    def product(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, weight, self.bias)

    @classmethod
    def delta_gradient(cls, kept: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: kept (..., in) or (..., K), grad_output (..., out). Returns: (n,)"""
        return sampled_product(_flat(grad_output), _flat(kept), weight.pattern_for(cls.axis), weight.transient_bytes)


class SparseConv1D(SampledModule, Conv1D):
    """GPT-2's linear layer with a selected weight (in, out)."""

    axis = -2

    def product(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, _flat(inputs), weight).view(*inputs.shape[:-1], self.nf)

    @classmethod
    def delta_gradient(cls, kept: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: kept (..., in) or (..., K), grad_output (..., out). Returns: (n,)"""
        return sampled_product(_flat(kept), _flat(grad_output), weight.pattern_for(cls.axis), weight.transient_bytes)


class SparseEmbedding(SampledModule, nn.Embedding):
    """nn.Embedding with a selected weight (rows, columns)."""

    axis = None

    def product(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def delta_gradient(self, ids: torch.Tensor, grad_output: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """Args: ids (...), grad_output (..., columns). Returns: (n,)"""
        ids, grad_NC, bound = ids.reshape(-1), _flat(grad_output), weight.transient_bytes
        if (columns := weight.input_columns(-1)) is not None:  # of a linear layer with the same weight
            grad_NC = grad_NC.index_select(1, columns)
        pattern = weight.pattern_for(-1)
        return embedding_product(ids, grad_NC, pattern, bound, self.padding_idx, self.scale_grad_by_freq)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


_SAMPLED = {nn.Linear: SparseLinear, Conv1D: SparseConv1D, nn.Embedding: SparseEmbedding}

# Same as nn.Linear except for rounding: x @ W.T + b. By name because the import takes seconds.
_EQUIVALENT_TO_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


@functools.cache
def sparse_class(plain: type[nn.Module], names: frozenset[str], packed: bool = False) -> type[SparseModule]:
    """The subclass of `plain` for a module whose parameters `names` are selected.

    Args: packed: whether its `weight` is selected and quantised.
    """
    sampled = next((base for base in _SAMPLED if issubclass(plain, base)), None) if "weight" in names else None
    if packed:
        bases: tuple[type, ...] = (QuantizedLinear, plain)
    elif sampled is None:
        bases = (SparseModule, plain)
    elif plain is sampled:
        bases = (_SAMPLED[sampled],)
    elif plain.forward is sampled.forward or f"{plain.__module__}.{plain.__qualname__}" in _EQUIVALENT_TO_LINEAR:
        bases = (_SAMPLED[sampled], plain)
    else:
        # Its forward may call that of nn.Linear or nn.Embedding, or read the weight itself. Both give right gradients.
        bases = (plain, _SAMPLED[sampled])
    members = {name: _property(name) for name in names}
    members |= {
        "plain_class": plain,
        "selected_names": names,
        "new": staticmethod(_new_packed if packed else new_module),
    }
    # DeepSpeed, transformers and other libraries compare names of classes
    members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, bases, members)


def _property(name: str) -> property:
    def read(module: SparseModule) -> torch.Tensor:
        weight, parameter = module.sparse_weights[name], module._parameters[name]
        if weight.is_packed:
            return parameter
        if not torch.compiler.is_compiling() or is_partitioned(parameter):
            return weight.read()
        delta = module._parameters[module.delta_names[name]]
        if not (weight.enabled and torch.is_grad_enabled() and delta.requires_grad):
            return parameter
        return compiled.Read.apply(delta, parameter, weight.number, weight.scale_text)

    return property(read)


def new_module(plain: type[nn.Module], names: frozenset[str]) -> SparseModule:
    """An empty sparse module, which unpickling fills."""
    kind = sparse_class(plain, names)
    return kind.__new__(kind)


def _new_packed(plain: type[nn.Module], names: frozenset[str]) -> SparseModule:
    kind = sparse_class(plain, names, packed=True)
    return kind.__new__(kind)


def attach(weight: TrainedDelta) -> None:
    """Make sparse modules of the modules that own the parameter, and register the tensors in them."""
    weight.attach()
    for index, (module, name) in enumerate(weight.owners):
        weights = module.__dict__.setdefault("sparse_weights", {})
        weights[name] = weight
        module.__dict__.setdefault("delta_names", {})[name] = weight.tensor_name(name, "delta")
        module.__dict__.setdefault("owner_indices", {})[name] = index
        module.__class__ = _class_of(module)
        if weight.is_packed:
            _rebind_forward(module)


def detach(weight: TrainedDelta) -> None:
    """Give the modules of a selected parameter their original classes. The parameter keeps its current values."""
    if not weight.is_attached:
        return
    weight.park()
    for module, name in weight.owners:
        del module.sparse_weights[name]
        plain = _plain_class(module)
        if module.sparse_weights:
            module.__class__ = _class_of(module)
        else:
            del module.sparse_weights, module.delta_names, module.owner_indices
            module.__class__ = plain
        if weight.is_packed:
            _rebind_forward(module)


def _rebind_forward(module: nn.Module) -> None:
    """Let Accelerate's hook of a model on several devices call the forward of the module's class. It has kept that of
    the class before, which is right only where the deltas are in the weight."""
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)


def _class_of(module: nn.Module) -> type[SparseModule]:
    weights = module.__dict__["sparse_weights"]
    return sparse_class(_plain_class(module), frozenset(weights), any(weight.is_packed for weight in weights.values()))


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return module.plain_class if isinstance(module, SparseModule) else type(module)
