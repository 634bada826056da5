"""The tensor that an access to a selected parameter returns. Its autograd graph includes the delta.

It works for any use of the parameter, but in general backward needs a dense gradient of the tensor temporarily. A
`WeightTensor` knows which rows of the weight it shows, which makes three kinds of uses cheaper:
- A view of whole rows, such as one of many experts, only needs the gradient of these rows. (A view of a converted copy
  needs that of the copy.)
- A conversion to another dtype still shows the same rows.
- A product or a lookup computes the gradient only at the selected positions (see `products`), never a dense one.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from sparse_zero.model.products import Lookup, Product, SampledGradient
from sparse_zero.model.row_range import RowRange, SelectedWeight
from sparse_zero.model.saved_weights import saved_by_reference

logger = logging.getLogger(__name__)


class WeightTensor(torch.Tensor):
    """Whole rows of a selected weight. Functions without a rule in RULES treat it as an ordinary tensor."""

    row_range: RowRange
    version: int
    """autograd's version counter at creation. After a change in place the tensor no longer equals these rows."""
    is_copy: bool = False
    """Whether it does not share memory with the weight, so that the caller may change it in place."""
    samples: torch.Tensor | None = None
    """int64 (S,): if set, the tensor is a copy (S, R, C) with the matrix of this index for each sample."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (cls, torch.Tensor, torch.nn.Parameter) for kind in types):
            # Another subclass has its own rules; it gets an ordinary tensor
            args, kwargs = tree_map_only(cls, _plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            rule = RULES.get(func) if torch.is_grad_enabled() else None
            if any(isinstance(arg, cls) and arg._version != arg.version for arg in (*args, *kwargs.values())):
                rule = None
            result = NotImplemented if rule is None else rule(func, args, kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result


def _plain(tensor: WeightTensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def as_weight_tensor(weight: SelectedWeight) -> torch.Tensor:
    """The current values of a parameter, in the autograd graph of its delta.

    The parameter must be gathered (ZeRO stage 3), and its deltas written.
    """
    values = weight.weight.detach()
    shape = values.shape if values.dim() > 1 else torch.Size((1, values.numel()))
    row_range = RowRange(weight, weight.effective_delta(), 0, shape)
    tensor = _ReadRows.apply(row_range.delta, values, row_range)
    return _weight_tensor(tensor, row_range) if values.dim() in (2, 3) else tensor


def _weight_tensor(tensor: torch.Tensor, row_range: RowRange, is_copy: bool = False) -> WeightTensor:
    """Make a WeightTensor of a tensor whose autograd graph includes the delta."""
    result = tensor.as_subclass(WeightTensor)
    result.row_range, result.version, result.is_copy = row_range, tensor._version, is_copy
    return result


class _ReadRows(torch.autograd.Function):
    """Rows of the parameter. Its backward selects the gradient of the delta from the dense gradient of the rows."""

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, values: torch.Tensor, row_range: RowRange) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.row_range = row_range
        # Autograd would make a view of the argument itself
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        _warn_of_dense_gradient(grad, ctx.row_range.weight)
        rows = grad.mT if ctx.row_range.transposed else grad
        return rows.reshape(-1).index_select(0, ctx.row_range.flat_positions()), None, None


def _warn_of_dense_gradient(dense: torch.Tensor, weight: SelectedWeight) -> None:
    """Warn once per parameter if the dense gradient needs more memory than `transient_mib` allows."""
    size, bound = dense.numel() * dense.element_size(), weight.transient_bytes
    if size > bound and not weight.warned_of_dense_gradient:
        weight.warned_of_dense_gradient = True
        logger.warning(
            "%s: the model uses this parameter in an operation without a sampled gradient. Each backward temporarily "
            "allocates the dense gradient: %.0f MiB, more than sparse.transient_mib (%.0f MiB)",
            weight.selection.name,
            size / 2**20,
            bound / 2**20,
        )


def _view(func: Callable, args: tuple, kwargs: dict) -> Any:
    weight, *others = args or (None,)  # keyword calls, torch.split(tensor=...), get the dense gradient
    if not isinstance(weight, WeightTensor) or weight.samples is not None:
        return NotImplemented
    # A view of a copy stays in the copy's graph: if the copy is changed in place, autograd must update the view
    values = weight if weight.is_copy else weight.detach()
    result = func(values, *others, **kwargs)
    views = [result] if isinstance(result, torch.Tensor) else result
    ranges = [weight.row_range.of_view(view, values) for view in views]
    if None in ranges:
        return result if weight.is_copy else NotImplemented
    tensors = [
        _weight_tensor(
            view if weight.is_copy else _ReadRows.apply(row_range.delta, view, row_range),
            row_range,
            weight.is_copy,
        )
        for view, row_range in zip(views, ranges, strict=True)
    ]
    return tensors[0] if isinstance(result, torch.Tensor) else type(result)(tensors)


def _convert(func: Callable, args: tuple, kwargs: dict) -> Any:
    result, (weight, *_) = func(*args, **kwargs), args or (None,)
    if isinstance(result, WeightTensor) or not isinstance(weight, WeightTensor) or weight.samples is not None:
        return result
    layouts = [(t.shape, t.stride(), t.device, t.requires_grad) for t in (result, weight)]
    return _weight_tensor(result, weight.row_range, is_copy=True) if layouts[0] == layouts[1] else result


def _index(func: Callable, args: tuple, kwargs: dict) -> Any:
    weight, index = args
    if not isinstance(weight, WeightTensor) or weight.samples is not None:
        return NotImplemented
    if _may_be_view(index):
        return _view(func, args, kwargs)
    if not isinstance(index, torch.Tensor) or index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    row_range = weight.row_range
    if row_range.is_matrix and not row_range.transposed:
        return _with_sampled_gradient(func, args, kwargs, _Call(weight, index, Lookup(row_range)))
    if not row_range.is_matrix and index.dim() == 1:
        copies = _weight_tensor(func(weight, index), row_range, is_copy=True)
        copies.samples = index % row_range.shape[0]
        return copies
    return NotImplemented


def _may_be_view(index: Any) -> bool:
    """Whether tensor[index] may be a view. `_view` would make a copy twice."""
    indices = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(i, list) or (isinstance(i, torch.Tensor) and i.dim()) for i in indices)


class _Call(NamedTuple):
    """The roles of the arguments in a call that uses a WeightTensor."""

    weight: torch.Tensor
    inputs: torch.Tensor
    operation: Product | Lookup
    groups: torch.Tensor | None = None
    """See `Product.gradient`."""


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> _Call | None:
    return _product(weight, input, by_transpose=True)


def _matmul(input: torch.Tensor, other: torch.Tensor) -> _Call | None:
    if isinstance(other, WeightTensor):
        return _product(other, input)
    return _product(input, other, is_left=True)


def _addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor) -> _Call | None:
    return _product(mat2, mat1)


def _product(weight: torch.Tensor, inputs: torch.Tensor, **settings: bool) -> _Call | None:
    if not isinstance(weight, WeightTensor) or not inputs.dim():
        return None
    if weight.dim() == 3 and (inputs.dim() != 3 or inputs.shape[0] != weight.shape[0]):
        return None
    if weight.samples is not None:
        return _Call(weight, inputs, Product(weight.row_range, **settings, grouping="samples"), weight.samples)
    return _Call(weight, inputs, Product(weight.row_range, **settings))


def _grouped_mm(
    input: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> _Call | None:
    if not isinstance(weight, WeightTensor) or weight.samples is not None or (input.dim(), weight.dim()) != (2, 3):
        return None
    return _Call(weight, input, Product(weight.row_range, grouping="ends"), offs)


def _grouped_products() -> Iterator[Callable]:
    """torch._grouped_mm (torch 2.8 and later), and transformers' fallback for tensors that it does not support."""
    with contextlib.suppress(AttributeError):
        yield torch._grouped_mm
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("transformers.integrations.moe")
        yield torch.ops.transformers.grouped_mm_fallback


def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Call | None:
    if (
        not isinstance(weight, WeightTensor)
        or not weight.row_range.is_matrix
        or weight.row_range.transposed
        or max_norm is not None
    ):
        return None
    return _Call(weight, input, Lookup(weight.row_range, padding_idx, scale_grad_by_freq))


def _use(func: Callable, args: tuple, kwargs: dict) -> Any:
    try:
        found = _USES[func](*args, **kwargs)
    except TypeError:  # arguments without a rule: out, alpha, ...
        found = None
    if found is None or found.inputs is found.weight:
        return NotImplemented
    return _with_sampled_gradient(func, args, kwargs, found)


def _with_sampled_gradient(func: Callable, args: tuple, kwargs: dict, found: _Call) -> torch.Tensor:
    """Call the function with a frozen weight, and add the gradient of the delta to its backward."""
    frozen, delta = found.weight.detach(), found.operation.row_range.delta
    args = tuple(frozen if arg is found.weight else arg for arg in args)
    with saved_by_reference([found.operation.row_range.weight]):
        output = func(*args, **{name: frozen if arg is found.weight else arg for name, arg in kwargs.items()})
    if not delta.numel():
        return output
    kept = found.operation.kept(found.inputs, output)
    return SampledGradient.apply(output, kept, found.groups, delta, found.operation)


_VIEWS = (
    *(torch.Tensor.select, torch.select, torch.Tensor.narrow, torch.narrow),
    *(torch.Tensor.unbind, torch.unbind, torch.Tensor.split, torch.split, torch.Tensor.chunk, torch.chunk),
    *(torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute, torch.Tensor.t, torch.t),
    *(torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.view, torch.Tensor.reshape, torch.reshape),
    *(torch.Tensor.squeeze, torch.squeeze, torch.Tensor.flatten, torch.flatten, torch.Tensor.unflatten),
)
_CONVERSIONS = (
    *(torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.contiguous, torch.Tensor.clone),
    *(torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.clone),
)
_USES: dict[Callable, Callable[..., _Call | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm), _matmul),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), _matmul),
    torch.addmm: _addmm,
    **dict.fromkeys(_grouped_products(), _grouped_mm),
    F.embedding: _embedding,
}
PRODUCTS = frozenset((F.linear, torch.matmul, torch.Tensor.__matmul__, torch.bmm, *_grouped_products()))
"""Functions of an input and a weight, in this order, of which backward needs the drawn columns of the input only."""
RULES: dict[Callable, Callable[[Callable, tuple, dict], Any]] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_CONVERSIONS, _convert),
    **dict.fromkeys(_USES, _use),
    torch.Tensor.__getitem__: _index,
}
"""For each function: a rule (func, args, kwargs) -> result, which may return NotImplemented."""
