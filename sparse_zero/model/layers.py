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
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.gradient.sampled import embedding_product, sampled_product
from sparse_zero.model import compiled, reads, state_dict
from sparse_zero.model.kept import Key, kept_columns, kept_input
from sparse_zero.model.refusals import refuse_replacement, refuse_second_derivatives, refuse_transforms
from sparse_zero.model.saved_weights import saved_by_reference
from sparse_zero.model.weight import SparseWeight
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


class SparseModule:
    """A mixin for modules with selected parameters. Each of these parameters is read through a property."""

    plain_class: ClassVar[type[nn.Module]]
    """The original class of the module."""
    selected_names: ClassVar[frozenset[str]]
    """Names of the selected parameters within the module."""
    sparse_weights: dict[str, SparseWeight]
    """The selected parameters by these names."""
    delta_names: dict[str, str]
    """The attributes of the module with their deltas."""
    owner_indices: dict[str, int]
    """The index of this module among the owners of each."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_traced = torch.compiler.is_compiling() and not any(map(is_partitioned, self._selected()))
        if is_traced or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        weights = self.sparse_weights.values()
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(reads.shared(weight))
            stack.enter_context(saved_by_reference(weight for weight in weights if is_whole(weight.weight)))
            return super().forward(*args, **kwargs)

    def _selected(self) -> list[nn.Parameter]:
        return [self._parameters[name] for name in self.sparse_weights]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.selected_names and isinstance(value, nn.Parameter):
            self.sparse_weights[name].replace(value)
        else:
            super().__setattr__(name, value)

    @property
    def parametrizations(self) -> nn.ModuleDict:
        """What torch.nn.utils.parametrize looks at before it parametrizes one of the module's parameters."""
        return self._modules.get("parametrizations") or _Unparametrized(self.sparse_weights)

    def __delattr__(self, name: str) -> None:
        if name in self.selected_names:
            refuse_replacement(self.sparse_weights[name].selection.name)
        super().__delattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        state_dict.refresh(self.sparse_weights)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state_dict.add_checksums(self.sparse_weights, destination, prefix)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict, *others: Any) -> None:
        with state_dict.loading(self, state, prefix, *others) as is_right:
            if is_right:
                super()._load_from_state_dict(state, prefix, metadata, *others)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        result = super()._apply(*args, **kwargs)
        for weight in self.sparse_weights.values():
            weight.share_columns()
        return result

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise UserError(
            "nn.DataParallel cannot run a sparse model: use DistributedDataParallel, with a process for each GPU "
            "(torchrun, `sparse-zero train`), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return new_module, (self.plain_class, self.selected_names), self.__getstate__()


class _Unparametrized(nn.ModuleDict):
    """No parametrizations, and none can be added to a sparse weight."""

    def __init__(self, weights: dict[str, SparseWeight]) -> None:
        super().__init__()
        self.__dict__["weights"] = weights

    def __contains__(self, name: str) -> bool:
        if name in self.weights:
            refuse_replacement(self.weights[name].selection.name)
        return False


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
    members = {name: _property(name) for name in names}
    members |= {"plain_class": plain, "selected_names": names}
    # DeepSpeed, transformers and other libraries compare names of classes
    members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, bases, members)


def _property(name: str) -> property:
    def read(module: SparseModule) -> torch.Tensor:
        weight, parameter = module.sparse_weights[name], module._parameters[name]
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


def attach(weight: SparseWeight) -> None:
    """Make sparse modules of the modules that own the parameter, and register the tensors in them."""
    weight.attach()
    for index, (module, name) in enumerate(weight.owners):
        weights = module.__dict__.setdefault("sparse_weights", {})
        weights[name] = weight
        module.__dict__.setdefault("delta_names", {})[name] = weight.tensor_name(name, "delta")
        module.__dict__.setdefault("owner_indices", {})[name] = index
        module.__class__ = sparse_class(_plain_class(module), frozenset(weights))


def detach(weight: SparseWeight) -> None:
    """Give the modules of a selected parameter their original classes. The parameter keeps its current values."""
    if not weight.is_attached:
        return
    weight.park()
    for module, name in weight.owners:
        del module.sparse_weights[name]
        plain = _plain_class(module)
        if module.sparse_weights:
            module.__class__ = sparse_class(plain, frozenset(module.sparse_weights))
        else:
            del module.sparse_weights, module.delta_names, module.owner_indices
            module.__class__ = plain


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return module.plain_class if isinstance(module, SparseModule) else type(module)
