"""The selected scalars of a parameter: their positions, and the tensors that the parameter's module gets for them.

The module that owns a parameter `weight` gets
    weight_delta         Parameter (n,)    trained; registered in every module that shares a tied weight
    weight_base          buffer (n,)       w0, the original values; in the state dict
    weight_strips        buffer (n / g,)   strip indices (see gradient/pattern.py), int32, or int64 from 2**31 possible
                                           strips on; created when first needed, never with indices: regenerated, and
                                           never if all scalars of the drawn columns are selected
    weight_columns       buffer (K,)       the drawn columns (see selection/columns.py)
With drawn columns, strips are indices into the inner weight, which consists of these columns.
A module that has such a name already gets `weight_sparse_delta` and so on.
"""

import functools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.gradient.pattern import AllScalars, InnerScalars, Pattern
from sparse_zero.selection.checks import checked_chunks, checksum
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.draws import in_chunks
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import is_partitioned

_KINDS = ("delta", "base", "strips", "columns")

_SHARED: weakref.WeakValueDictionary[tuple, torch.Tensor] = weakref.WeakValueDictionary()
"""The drawn columns that are in use. Layers that share them have one tensor, so that a compiler sees that they do."""

ALIGNED = 8
"""Whole columns are padded to a multiple of it: tensor cores read 16 bytes of a row at a time."""


class SelectedScalars:
    """The selected scalars of one parameter."""

    def __init__(self, target: Target, selection: Selection, config: SparseConfig) -> None:
        self.owners, self.selection = target.owners, selection
        self.transient_bytes = config.transient_mib * 2**20
        self.regenerates = config.indices == "regenerated" and selection.can_regenerate
        self.shape = target.shape or torch.Size([1])
        assert selection.count > 0, f"{selection.name}: a delta of length 0 breaks ZeRO stage 3"
        self._infix = _free_infix(self.owners)
        self._delta_name = self.tensor_name(self.owners[0][1], "delta")
        self._parked: dict[str, torch.Tensor] | None = {}
        """The tensors while no module has them: before `attach` and after `park`."""
        if selection.columns:
            self._parked["columns"] = _shared_columns(selection, self.weight.device)
        self._row_starts: dict[int, int] = {}
        """For some rows: the number of selected scalars in the rows before."""
        self._checksum: str | None = None

    @property
    def weight(self) -> nn.Parameter:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO stage 3 partitions the parameter.

        Not read through `weight`: DeepSpeed takes an access within a forward as a use, and gathers the parameter.
        """
        module, name = self.owners[0]
        return is_partitioned(dict.__getitem__(module._parameters, name))

    @property
    def delta(self) -> nn.Parameter:
        """(n,)"""
        if self._parked is not None:
            return self._parked["delta"]
        # Read before every product: torch's own __getattr__ takes several times as long
        return self.owners[0][0]._parameters[self._delta_name]

    @property
    def base(self) -> torch.Tensor:
        """(n,), the original values."""
        return self._tensor("base")

    @property
    def device(self) -> torch.device:
        """Where the positions are."""
        return self.base.device

    @property
    def columns(self) -> torch.Tensor | None:
        """The drawn columns, int64. Those that are trained whole are followed by repetitions of the last one, up to a
        multiple of 8. None if scalars are drawn from the whole weight."""
        return self._tensor("columns") if self.selection.columns else None

    def share_columns(self) -> None:
        """Share the tensor of the columns again, after the model was moved to another device."""
        if (columns := self.columns) is not None and not columns.is_meta:
            self._set_tensor("columns", _shared_columns(self.selection, columns.device))

    # The tensors

    def attach(self) -> None:
        """Register the tensors in the modules that own the parameter, on its device."""
        device, tensors, self._parked = self.weight.device, self._parked, None
        for kind, tensor in tensors.items():
            if kind == "delta":
                if tensor.device != device:
                    tensor.data = tensor.data.to(device)
                for module, name in self.owners:
                    module.register_parameter(self.tensor_name(name, kind), tensor)
            else:
                self._set_tensor(kind, tensor.to(device))

    def park(self) -> None:
        """Remove the tensors from the modules, and keep them."""
        if self._parked is not None:
            return
        (module, name), parked = self.owners[0], {}
        for kind in _KINDS:
            attribute = self.tensor_name(name, kind)
            if kind == "delta":
                parked[kind] = module._parameters[attribute]
                for owner, weight_name in self.owners:
                    del owner._parameters[self.tensor_name(weight_name, kind)]
            elif attribute in module._buffers:
                parked[kind] = module._buffers.pop(attribute)
                module._non_persistent_buffers_set.discard(attribute)
        self._parked = parked

    @property
    def is_attached(self) -> bool:
        return self._parked is None

    def tensor_name(self, weight_name: str, kind: str) -> str:
        """The attribute of a module for one of the tensors: `weight_delta`."""
        return f"{weight_name}_{self._infix}{kind}"

    def _tensor(self, kind: str) -> torch.Tensor:
        if self._parked is not None:
            return self._parked[kind]
        module, name = self.owners[0]
        return module._buffers[self.tensor_name(name, kind)]

    def _set_tensor(self, kind: str, value: torch.Tensor) -> None:
        if self._parked is not None:
            self._parked[kind] = value
            return
        module, name = self.owners[0]
        module.register_buffer(self.tensor_name(name, kind), value, persistent=kind == "base")

    def _has_strips(self) -> bool:
        if self._parked is not None:
            return "strips" in self._parked
        module, name = self.owners[0]
        return self.tensor_name(name, "strips") in module._buffers

    # The positions

    def take_positions(self, position_chunks: Iterable[torch.Tensor]) -> None:
        """Check the positions, and keep them unless they are drawn again whenever they are needed.

        Args:
            position_chunks: the positions in the flattened parameter in chunks, int64, sorted.

        Raises:
            UserError: the positions do not fit the parameter, or `position_chunks` raises it. Then the weight has no
                positions and must not be used.
        """
        selection = self.selection
        if self.shape != (selection.shape or (1,)):
            raise UserError(
                f"{selection.name}: the model has shape {list(self.shape)}, the selection {list(selection.shape)}"
            )
        skips_strips = self.regenerates or selection.granularity > 1 or selection.columns is not None
        strips = None if skips_strips else self._empty_strips(selection.strip_count)
        start = 0
        for flat in checked_chunks(selection, position_chunks):
            if strips is not None:
                strips[start : start + flat.numel()] = flat
            start += flat.numel()
        if strips is not None:
            self._set_tensor("strips", strips)

    @property
    def checksum(self) -> str:
        """The checksum of the positions, see `checks.checksum`."""
        if self._checksum is None:
            self._checksum = checksum(self.flat_positions())
        return self._checksum

    @property
    def pattern(self) -> Pattern | AllScalars:
        """The selected positions in the parameter as a matrix; with drawn columns, in the inner weight."""
        if self.selection.fills_columns:
            return self._all_scalars
        rows, columns = math.prod(self._inner_shape[:-1]), self._inner_shape[-1]
        return Pattern(self.strips(), rows, columns, self.selection.granularity)

    @functools.cached_property
    def _all_scalars(self) -> AllScalars:
        return AllScalars(math.prod(self._inner_shape[:-1]), self._inner_shape[-1])

    def inner_scalars(self) -> InnerScalars:
        """The selected scalars of a weight with drawn columns."""
        drawn, width = self.selection.columns, self.shape[self.selection.columns.axis]
        indices = None if self.selection.fills_columns else self.strips()
        return InnerScalars(indices, self.columns, drawn.count, width, 1 if drawn.axis == -1 else self.shape[-1])

    @property
    def _inner_shape(self) -> tuple[int, ...]:
        return self.selection.inner_shape if self.selection.columns else self.shape

    def input_columns(self, axis: int | None) -> torch.Tensor | None:
        """The columns of its input that a layer keeps, which meets dimension `axis` of the weight. None: all."""
        columns = self.selection.columns
        return self.columns if columns and columns.axis == axis else None

    def pattern_for(self, axis: int | None) -> Pattern | AllScalars:
        """The pattern for an input of which a layer kept `input_columns(axis)`."""
        if self.selection.columns is None or self.selection.columns.axis == axis:
            return self.pattern
        rows = self.shape[:-1].numel()
        return next(self.patterns(0, rows, rows))

    def strips(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The strips [start, stop), as from Selection.strip_chunks, in the narrowest dtype."""
        if self.selection.fills_columns:
            stop = self.selection.count if stop is None else stop
            return torch.arange(start, stop, dtype=self.selection.strip_dtype, device=self.device)
        if self._has_strips():
            strips = self._tensor("strips")
            return strips if start == 0 and stop is None else strips[start:stop]
        if not self.regenerates:
            self._set_tensor("strips", self._draw_strips(0, self.selection.strip_count))
            return self.strips(start, stop)
        return self._draw_strips(start, self.selection.strip_count if stop is None else stop)

    def _draw_strips(self, start: int, stop: int) -> torch.Tensor:
        strips, filled = self._empty_strips(stop - start), 0
        for chunk in self.selection.strip_chunks(self.device, start, stop):
            strips[filled : filled + chunk.numel()] = chunk
            filled += chunk.numel()
        return strips

    def _empty_strips(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=self.selection.strip_dtype, device=self.weight.device)

    def flat_positions(self) -> torch.Tensor:
        """The selected positions in the flattened parameter, int64 (n,), sorted."""
        return torch.cat([*self._flat_chunks()])

    def _flat_chunks(self) -> Iterator[torch.Tensor]:
        """`flat_positions` in chunks."""
        if self.selection.granularity > 1:
            yield from self.pattern.flat_chunks()
        elif self.regenerates or self.selection.fills_columns:
            yield from self.selection.chunks(self.device)
        else:
            yield from (self.selection.positions_of(strips, self.columns) for strips in in_chunks(self.strips()))

    def _weight_strip_chunks(self) -> Iterator[torch.Tensor]:
        """The strip indices in the weight: in chunks if they are made of others, otherwise all at once."""
        if self.selection.granularity == 1 and (self.regenerates or self.selection.columns):
            yield from self._flat_chunks()
        else:
            yield self.strips()

    # Parts of the weight

    def row_slice(self, first: int, rows: int) -> slice:
        """The slice of the delta that belongs to rows [first, first + rows) of the weight as a matrix.

        Both bounds must be multiples of the granularity.
        """
        if not self._row_starts:
            # The bounds of all experts at once: one synchronisation with the accelerator
            matrix_rows = self.shape[-2] if len(self.shape) > 1 else 1
            self._find_row_starts(range(0, self.shape[:-1].numel() + 1, matrix_rows))
        if missing := [row for row in (first, first + rows) if row not in self._row_starts]:
            self._find_row_starts(missing)
        return slice(self._row_starts[first], self._row_starts[first + rows])

    def _find_row_starts(self, rows: Sequence[int]) -> None:
        g, selection = self.selection.granularity, self.selection
        starts = torch.tensor(rows, device=self.device)
        if selection.columns:
            starts = selection.columns.inner_starts(starts, self.columns[: selection.columns.count], selection.shape)
        else:
            starts = starts // g * self.shape[-1]
        if not selection.fills_columns:
            strips = self.strips()
            starts = torch.searchsorted(strips, starts.to(strips.dtype))
        self._row_starts |= {row: start * g for row, start in zip(rows, starts.tolist(), strict=True)}

    def patterns(self, first: int, rows: int, rows_per_pattern: int) -> Iterator[Pattern]:
        """The patterns of rows [first, first + rows) of the weight as a matrix, one for each `rows_per_pattern`."""
        g, columns = self.selection.granularity, self.shape[-1]
        for start, part in self._parts(first, rows, rows_per_pattern):
            if self.selection.columns:
                part = self.selection.positions_of(part, self.columns)
            yield Pattern(part - start // g * columns, rows_per_pattern, columns, g)

    def inner_patterns(self, first: int, rows: int, rows_per_pattern: int) -> Iterator[Pattern | AllScalars]:
        """`patterns` in the inner weight. Where inputs are in the rows, the rows must be those of whole matrices."""
        inner_height, width = self._inner_shape[-2:]

        def inner(row: int) -> int:
            return row if self.selection.columns.axis == -1 else row // self.shape[-2] * inner_height

        if self.selection.fills_columns:
            yield from [AllScalars(inner(rows_per_pattern), width)] * (rows // rows_per_pattern)
            return
        for start, part in self._parts(first, rows, rows_per_pattern):
            yield Pattern(part - inner(start) * width, inner(rows_per_pattern), width)

    def _parts(self, first: int, rows: int, rows_per_part: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and the strips of each part."""
        g = self.selection.granularity
        is_drawn = (self.regenerates and self.selection.is_sliceable) or self.selection.fills_columns
        strips = None if is_drawn else self.strips()
        for start in range(first, first + rows, rows_per_part):
            scalars = self.row_slice(start, rows_per_part)
            part = slice(scalars.start // g, scalars.stop // g)
            yield start, (self.strips(part.start, part.stop) if strips is None else strips[part])


def _shared_columns(selection: Selection, device: torch.device) -> torch.Tensor:
    key = selection.columns_key, device
    found = _SHARED.get(key)
    return _SHARED.setdefault(key, padded(selection, selection.drawn_columns(device))) if found is None else found


def padded(selection: Selection, drawn: torch.Tensor) -> torch.Tensor:
    """The columns as in `SelectedScalars.columns`."""
    if not selection.fills_columns or drawn.numel() < ALIGNED:
        return drawn
    return torch.cat([drawn, drawn[-1:].expand(-drawn.numel() % ALIGNED)])


def _free_infix(owners: Sequence[tuple[nn.Module, str]]) -> str:
    """What stands between `weight_` and `delta` so that no module has these names already: nothing, if possible."""
    infix = ""
    while any(hasattr(module, f"{name}_{infix}{kind}") for module, name in owners for kind in _KINDS):
        infix += "sparse_"
    return infix
