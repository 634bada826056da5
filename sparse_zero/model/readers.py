"""What readers of a selected parameter get: a tensor whose graph leads the gradient to the delta.

That covers every reader, at the price of a dense gradient of what is shown for a moment. A `Piece` knows which rows of
the weight it shows, and with it three kinds of readers cost less:
- a view of whole rows, such as one expert of many, has the gradient of those rows alone (but where it is a view of a
  converted copy: that copy's);
- a conversion to another dtype still shows the same rows;
- a product or a lookup yields the gradient at the selected positions (`products`), and never a dense one.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from sparse_zero.model.products import Lookup, Product, SampledUse, kept_input
from sparse_zero.model.row_range import RowRange, SelectedWeight

logger = logging.getLogger(__name__)


class Piece(torch.Tensor):
    """Whole rows of a selected weight. An ordinary tensor to functions without a rule and to what sees no subclass."""

    rows_shown: RowRange
    version: int
    """autograd's count of changes in place, as it was: what was changed since is no longer what those rows hold."""
    is_copy: bool = False
    """Whether it has memory of its own, which its reader may change."""
    samples: torch.Tensor | None = None
    """int64 (S,): what is shown is a copy, (S, R, C), of these matrices of the rows."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (cls, torch.Tensor, torch.nn.Parameter) for kind in types):
            # Another subclass has rules of its own; to those ours is an ordinary tensor
            args, kwargs = tree_map_only(cls, _plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            rule = RULES.get(func) if torch.is_grad_enabled() else None
            if any(isinstance(arg, cls) and arg._version != arg.version for arg in (*args, *kwargs.values())):
                rule = None
            result = NotImplemented if rule is None else rule(func, args, kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result


def _plain(piece: Piece) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return piece.as_subclass(torch.Tensor)


def readable(weight: SelectedWeight) -> torch.Tensor:
    """The parameter, which is whole and holds its deltas, for those who read it now."""
    values = weight.weight.detach()
    shape = values.shape if values.dim() > 1 else torch.Size((1, values.numel()))
    rows_shown = RowRange(weight, weight.change(), 0, shape)
    shown = _ReadGradient.apply(rows_shown.change, values, rows_shown)
    return _piece(shown, rows_shown) if values.dim() in (2, 3) else shown


def _piece(tensor: torch.Tensor, rows_shown: RowRange, is_copy: bool = False) -> Piece:
    """Args: tensor: its graph leads to the delta."""
    piece = tensor.as_subclass(Piece)
    piece.rows_shown, piece.version, piece.is_copy = rows_shown, tensor._version, is_copy
    return piece


class _ReadGradient(torch.autograd.Function):
    """Rows of the parameter; its backward picks the delta's gradient out of theirs."""

    @staticmethod
    def forward(ctx: Any, change: torch.Tensor, values: torch.Tensor, rows_shown: RowRange) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.rows_shown = rows_shown
        # Not the argument itself, of which autograd would make a view
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        _tell_of(grad, ctx.rows_shown.weight)
        rows = grad.mT if ctx.rows_shown.transposed else grad
        return rows.reshape(-1).index_select(0, ctx.rows_shown.flat_positions()), None, None


def _tell_of(dense: torch.Tensor, weight: SelectedWeight) -> None:
    """Once per parameter: it takes more memory than a gradient should."""
    size, bound = dense.numel() * dense.element_size(), weight.transient_bytes
    if size > bound and not weight.told_of_dense_gradient:
        weight.told_of_dense_gradient = True
        logger.warning(
            "%s: how it is used has no sampled gradient; each backward takes its dense one for a moment: "
            "%.0f MiB, more than the bound of %.0f MiB",
            weight.selection.name,
            size / 2**20,
            bound / 2**20,
        )


def _viewed(func: Callable, args: tuple, kwargs: dict) -> Any:
    shown, *others = args or (None,)  # torch.split(tensor=...) is left to the dense gradient
    if not isinstance(shown, Piece) or shown.samples is not None:
        return NotImplemented
    # A change of a copy in place has to reach its views by autograd; their dense gradients are those of the copy
    values = shown if shown.is_copy else shown.detach()
    result = func(values, *others, **kwargs)
    views = [result] if isinstance(result, torch.Tensor) else result
    ranges = [shown.rows_shown.of_view(view, values) for view in views]
    if None in ranges:
        return result if shown.is_copy else NotImplemented
    pieces = [
        _piece(
            view if shown.is_copy else _ReadGradient.apply(rows_shown.change, view, rows_shown),
            rows_shown,
            shown.is_copy,
        )
        for view, rows_shown in zip(views, ranges, strict=True)
    ]
    return pieces[0] if isinstance(result, torch.Tensor) else type(result)(pieces)


def _converted(func: Callable, args: tuple, kwargs: dict) -> Any:
    result, (shown, *_) = func(*args, **kwargs), args or (None,)
    if isinstance(result, Piece) or not isinstance(shown, Piece) or shown.samples is not None:
        return result
    layouts = [(t.shape, t.stride(), t.device, t.requires_grad) for t in (result, shown)]
    return _piece(result, shown.rows_shown, is_copy=True) if layouts[0] == layouts[1] else result


def _indexed(func: Callable, args: tuple, kwargs: dict) -> Any:
    shown, index = args
    if not isinstance(shown, Piece) or shown.samples is not None:
        return NotImplemented
    if _is_view(index):
        return _viewed(func, args, kwargs)
    if not isinstance(index, torch.Tensor) or index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    rows_shown = shown.rows_shown
    if rows_shown.is_matrix and not rows_shown.transposed:
        return _sampled(func, args, kwargs, _Use(shown, index, Lookup(rows_shown)))
    if not rows_shown.is_matrix and index.dim() == 1:
        copies = _piece(func(shown, index), rows_shown, is_copy=True)
        copies.samples = index % rows_shown.shape[0]
        return copies
    return NotImplemented


def _is_view(index: Any) -> bool:
    """Whether tensor[index] may be a view; a copy would be made twice."""
    several = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(i, list) or (isinstance(i, torch.Tensor) and i.dim()) for i in several)


class _Use(NamedTuple):
    """What a call makes of a piece."""

    shown: torch.Tensor
    inputs: torch.Tensor
    use: Product | Lookup
    parting: torch.Tensor | None = None


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> _Use | None:
    return _product(weight, input, by_rows=True)


def _matmul(input: torch.Tensor, other: torch.Tensor) -> _Use | None:
    if isinstance(other, Piece):
        return _product(other, input)
    return _product(input, other, is_left=True)


def _addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor) -> _Use | None:
    return _product(mat2, mat1)


def _product(shown: torch.Tensor, inputs: torch.Tensor, **how: bool) -> _Use | None:
    if not isinstance(shown, Piece) or not inputs.dim():
        return None
    if shown.dim() == 3 and (inputs.dim() != 3 or inputs.shape[0] != shown.shape[0]):
        return None
    if shown.samples is not None:
        return _Use(shown, inputs, Product(shown.rows_shown, **how, parts="samples"), shown.samples)
    return _Use(shown, inputs, Product(shown.rows_shown, **how))


def _grouped_mm(
    input: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> _Use | None:
    if not isinstance(weight, Piece) or weight.samples is not None or (input.dim(), weight.dim()) != (2, 3):
        return None
    return _Use(weight, input, Product(weight.rows_shown, parts="ends"), offs)


def _grouped_products() -> Iterator[Callable]:
    """Torch's own, from 2.8 on, and what transformers has for tensors that it does not take."""
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
) -> _Use | None:
    if (
        not isinstance(weight, Piece)
        or not weight.rows_shown.is_matrix
        or weight.rows_shown.transposed
        or max_norm is not None
    ):
        return None
    return _Use(weight, input, Lookup(weight.rows_shown, padding_idx, scale_grad_by_freq))


def _used(func: Callable, args: tuple, kwargs: dict) -> Any:
    try:
        found = _USES[func](*args, **kwargs)
    except TypeError:  # arguments that its rule does not know: out, alpha, ...
        found = None
    if found is None or found.inputs is found.shown:
        return NotImplemented
    return _sampled(func, args, kwargs, found)


def _sampled(func: Callable, args: tuple, kwargs: dict, found: _Use) -> torch.Tensor:
    """The function's own result of the weight as it is, with the gradient of the delta beside its other gradients."""
    frozen, change = found.shown.detach(), found.use.rows_shown.change
    args = tuple(frozen if arg is found.shown else arg for arg in args)
    output = func(*args, **{name: frozen if arg is found.shown else arg for name, arg in kwargs.items()})
    if not change.numel():
        return output
    return SampledUse.apply(output, kept_input(found.inputs, output), found.parting, change, found.use)


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
_USES: dict[Callable, Callable[..., _Use | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm), _matmul),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), _matmul),
    torch.addmm: _addmm,
    **dict.fromkeys(_grouped_products(), _grouped_mm),
    F.embedding: _embedding,
}
RULES: dict[Callable, Callable[[Callable, tuple, dict], Any]] = {
    **dict.fromkeys(_VIEWS, _viewed),
    **dict.fromkeys(_CONVERSIONS, _converted),
    **dict.fromkeys(_USES, _used),
    torch.Tensor.__getitem__: _indexed,
}
