"""A selected parameter: it is frozen and has a trainable 1-D delta for its n selected positions.

W[selected] = w0 + delta is written into the parameter itself, so that the model's own forward uses it. The parameter
keeps its name and its entry in the state dict. The module that owns a parameter `weight` gets in addition
    weight_delta         Parameter (n,)    trained; registered in every module that shares a tied weight
    weight_base          buffer (n,)       w0, the original values, so that unmerging is exact
    weight_strips        buffer (n / g,)   strip indices (see gradient/pattern.py), int32, or int64 from 2**31 possible
                                           strips on; created when first needed, never with indices: regenerated
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight_tensor import as_weight_tensor
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection, in_chunks, stream_key
from sparse_zero.selection.targets import Target
from sparse_zero.selection.unsupported import no_values
from sparse_zero.zero.parameters import full_shape, gathered, is_partitioned, is_whole


class SparseWeight:
    """A selected parameter and its tensors. It writes the deltas into the parameter, and creates what reads return."""

    def __init__(self, target: Target, selection: Selection, counter: StepCounter, config: SparseConfig) -> None:
        """Register the tensors in the modules that own the parameter. `initialize` fills them."""
        self.owners, self.selection, self.counter = target.owners, selection, counter
        self.dropout, self.transient_bytes = config.dropout, config.transient_mib * 2**20
        self.regenerates = config.indices == "regenerated" and selection.can_regenerate
        self.enabled, self.scale = True, 1.0
        self.reads_plain = False
        """Whether `read` returns the parameter itself: during the forward of a SampledModule."""
        weight = self.weight
        self.shape = full_shape(weight) or torch.Size([1])
        assert selection.count > 0, f"{selection.name}: a delta of length 0 breaks ZeRO stage 3"
        # Under ZeRO stage 3 the delta has the weight's dtype; the optimizer's partition has its float32 values
        dtype = weight.dtype if is_partitioned(weight) else torch.float32
        delta = nn.Parameter(torch.empty(selection.count, dtype=dtype, device=weight.device))
        for module, name in self.owners:
            module.register_parameter(f"{name}_delta", delta)
        self._set_buffer("base", torch.empty(selection.count, dtype=weight.dtype, device=weight.device))
        self.warned_of_dense_gradient = False
        self._shares_reads = False
        self._shared_read: torch.Tensor | None = None
        self._row_starts: dict[int, int] = {}
        """For some rows: the number of selected scalars in the rows before."""
        self._written: tuple | None = None
        """The `_state` that was last written into the parameter."""
        self._copy_written: tuple | None = None
        """The same for the copy that ZeRO stage 3 gathered."""

    @torch.no_grad()
    def initialize(self, position_chunks: Iterable[torch.Tensor], deltas: torch.Tensor | None = None) -> None:
        """Save the original values, and set the deltas. Given deltas are also written into the parameter.

        Under ZeRO stage 3, all ranks must call it.

        Args:
            position_chunks: the positions in the flattened parameter in chunks, int64, sorted.
            deltas: (n,); None for zeros.

        Raises: what `position_chunks` raises. If that is after its last chunk, the original values can be restored.
        """
        weight, delta, base = self.weight, self.delta.detach(), self.base
        writes = deltas is not None and not is_partitioned(weight)
        skips_strips = self.regenerates or self.selection.granularity > 1 or (writes and self.selection.can_regenerate)
        strips = None if skips_strips else self._empty_strips(self.selection.strip_count)
        if deltas is None:
            delta.zero_()
        start = 0
        try:
            with gathered([weight]):
                whole = weight.detach().view(-1)
                # In one loop: the positions and values of a chunk are still in the cache when the sum is written
                for flat in position_chunks:
                    chunk = slice(start, start + flat.numel())
                    torch.index_select(whole, 0, flat, out=base[chunk])
                    if deltas is not None:
                        delta[chunk] = deltas[chunk]
                    if writes:
                        whole.index_copy_(0, flat, _sum(base[chunk], delta[chunk]).to(whole.dtype))
                    if strips is not None:
                        strips[chunk] = flat
                    start = chunk.stop
            assert start == self.selection.count, (self.selection, start)
        finally:
            if strips is not None:
                self._set_buffer("strips", strips)
            if writes:
                self._written = self._state(self.dropout_step)

    @property
    def weight(self) -> nn.Parameter:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def delta(self) -> nn.Parameter:
        """(n,)"""
        return self._companion("delta")

    @property
    def base(self) -> torch.Tensor:
        """(n,), the original values."""
        return self._companion("base")

    @property
    def pattern(self) -> Pattern:
        """The selected positions, in the parameter as a matrix."""
        return self._pattern_of(self.strips())

    def _pattern_of(self, strips: torch.Tensor) -> Pattern:
        return Pattern(strips, self.shape[:-1].numel(), self.shape[-1], self.selection.granularity)

    def strips(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The strips [start, stop), as from Selection.strip_chunks, in the narrowest dtype."""
        if self._has_buffer("strips"):
            strips = self._companion("strips")
            return strips if start == 0 and stop is None else strips[start:stop]
        if not self.regenerates:
            self._set_buffer("strips", self._draw_strips(0, self.selection.strip_count))
            return self.strips(start, stop)
        return self._draw_strips(start, self.selection.strip_count if stop is None else stop)

    def _draw_strips(self, start: int, stop: int) -> torch.Tensor:
        strips, filled = self._empty_strips(stop - start), 0
        for chunk in self.selection.strip_chunks(self.base.device, start, stop):
            strips[filled : filled + chunk.numel()] = chunk
            filled += chunk.numel()
        return strips

    def _companion(self, kind: str) -> torch.Tensor:
        """The tensor `weight_KIND` of the module that owns the parameter `weight`."""
        module, name = self.owners[0]
        return getattr(module, f"{name}_{kind}")

    def _set_buffer(self, kind: str, value: torch.Tensor) -> None:
        module, name = self.owners[0]
        module.register_buffer(f"{name}_{kind}", value, persistent=False)

    def _has_buffer(self, kind: str) -> bool:
        module, name = self.owners[0]
        return f"{name}_{kind}" in module._buffers

    @property
    def trains(self) -> bool:
        """Whether a computation now must include the delta in its autograd graph."""
        return self.enabled and torch.is_grad_enabled() and self.delta.requires_grad

    def flat_positions(self) -> torch.Tensor:
        """The selected positions in the flattened parameter, int64 (n,), sorted."""
        return torch.cat([*self._flat_chunks()])

    def _flat_chunks(self) -> Iterator[torch.Tensor]:
        """`flat_positions` in chunks."""
        if self.selection.granularity > 1:
            yield from self.pattern.flat_chunks()
        elif self.regenerates:
            yield from self.selection.chunks(self.base.device)
        else:
            yield from (strips.long() for strips in in_chunks(self.strips()))

    def _strip_chunks(self) -> Iterator[torch.Tensor]:
        """The strip indices: in chunks if single scalars are regenerated, otherwise all at once."""
        if self.regenerates and self.selection.granularity == 1:
            yield from self.selection.chunks(self.base.device)
        else:
            yield self.strips()

    def _empty_strips(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=self.selection.strip_dtype, device=self.weight.device)

    @torch.no_grad()
    def write(self, dropout_step: int | None = None) -> None:
        """Write W[selected] = w0 + delta, or w0 while disabled. The weight must be gathered.

        Args:
            dropout_step: the number of the training forward whose dropout mask applies; None for no dropout.
        """
        factor = self.factor(dropout_step)
        weight = self.weight
        if weight.is_meta or self.delta.is_meta:  # the model was offloaded after `sparsify`
            raise no_values(self.selection.name, [module for module, _ in self.owners])
        # A stage-3 copy is written after each gather with the values that the graph has seen, so autograd must not
        # count a change. Otherwise the count makes backward fail for graphs from before an optimizer step.
        whole = (weight.data if is_partitioned(weight) else weight.detach()).view(-1)
        write_strips = self._strip_writer(whole) if self._kernels_support(factor) else None
        scalars_per_index = self.selection.granularity if write_strips else 1
        start = 0
        for indices in self._strip_chunks() if write_strips else self._flat_chunks():
            chunk = slice(start, start + indices.numel() * scalars_per_index)
            values, delta = self.base[chunk], None
            if self.enabled:
                delta = self.delta.detach()[chunk]
                if factor is not None:
                    delta = delta * (factor[chunk] if isinstance(factor, torch.Tensor) else factor)
            if write_strips:
                write_strips(whole, values, delta, indices)
            else:
                values = values if delta is None else _sum(values, delta).to(weight.dtype)
                whole.index_copy_(0, indices, values)
            start = chunk.stop

    def _strip_writer(self, whole: torch.Tensor) -> Callable[..., None] | None:
        """A function of (matrix, base, delta, strip_indices) that writes base + delta in one kernel; None if the
        device has none."""
        columns, g = self.shape[-1], self.selection.granularity
        if operators := cpu.loaded_operators(whole):
            return lambda *tensors: operators.write_deltas.default(*tensors, columns, g)
        if not has_kernels(whole) or whole.element_size() > 4:
            return None
        from sparse_zero.gradient.triton_kernels import write_deltas

        return lambda matrix, base, delta, strips: write_deltas(matrix, base, delta, self._pattern_of(strips))

    def _kernels_support(self, factor: torch.Tensor | float | None) -> bool:
        """Whether the operator and the kernel that write strips support the dtypes of `write`."""
        supported = {self.weight.dtype, torch.float32}
        given = {self.delta.dtype, factor.dtype if isinstance(factor, torch.Tensor) else torch.float32}
        return given <= supported and self.base.dtype == self.weight.dtype

    @property
    def is_written(self) -> bool:
        """Whether deltas were written into the parameter itself, not only into a copy that ZeRO stage 3 gathered."""
        return self._written is not None

    def refresh(self) -> None:
        """Write the deltas unless the weight has them already. Called before each read of the weight."""
        if is_partitioned(self.weight):
            if is_whole(self.weight):
                self.refresh_copy(self.dropout_step)
        elif self._written != self._state(self.dropout_step):
            self.write(self.dropout_step)
            self._written = self._state(self.dropout_step)

    def refresh_copy(self, dropout_step: int | None) -> None:
        """Write into the copy that ZeRO stage 3 gathered, unless this forward of the model has written it already.

        A small weight often stays gathered from forward to backward. Each gather allocates a new tensor.

        Args:
            dropout_step: see `write`.
        """
        weight, delta = self.weight, self.delta
        copies = (StorageWeakRef(tensor.untyped_storage()) for tensor in (weight, delta))
        state = self.counter.forwards, *self._state(dropout_step), *copies
        if self._copy_written != state:
            self.write(dropout_step)
            self._copy_written = state

    @property
    def dropout_step(self) -> int | None:
        """The number of the training forward whose dropout mask applies now; None for no dropout."""
        return self.counter.training_forwards if self.dropout and self.counter.training else None

    def factor(self, dropout_step: int | None) -> torch.Tensor | float | None:
        """The factor of the delta: the scale, times the dropout mask (n,) if there is dropout. None for 1."""
        if dropout_step is None:
            return None if self.scale == 1 else self.scale
        # Depends on the step only: the same in a recomputation, after stage 3's next gather and on every rank
        generator = torch.Generator(self.delta.device)
        generator.manual_seed(abs(stream_key(self.selection.seed, self.selection.name, f"dropout/{dropout_step}")))
        kept = torch.rand(self.base.numel(), generator=generator, device=self.delta.device) >= self.dropout
        return kept * (self.scale / (1 - self.dropout))

    def _state(self, dropout_step: int | None) -> tuple:
        """A value that changes when w0 + delta may no longer be in the weight: after a step, a load, an assignment, or
        when the adapter is disabled."""
        weight, delta = self.weight, self.delta
        tensors = (id(delta), delta._version, id(weight), weight._version)
        return self.counter.steps, self.enabled, self.scale, dropout_step, *tensors

    def invalidate(self) -> None:
        """Make the next forward write the deltas. Needed after changes that autograd does not count (`delta.data`)."""
        self._written = self._copy_written = None

    def __getstate__(self) -> dict[str, Any]:
        # A StorageWeakRef must not be copied
        return self.__dict__ | {"_copy_written": None}

    def read(self) -> torch.Tensor:
        """The tensor that an access to the module's parameter returns."""
        self.refresh()
        weight = self.weight
        if self.reads_plain or not self.trains or not is_whole(weight):
            return weight
        tensor = as_weight_tensor(self) if self._shared_read is None else self._shared_read
        # Makes isinstance(tensor, nn.Parameter) true, which Module.get_parameter, among others, requires
        tensor._is_param = True
        if self._shares_reads:
            self._shared_read = tensor
        return tensor

    @contextmanager
    def share_reads(self) -> Iterator[None]:
        """Within this block, which is one forward of a module, all reads return the same tensor. Experts that are read
        one by one then share one gradient of the delta."""
        self._shares_reads = True
        try:
            yield
        finally:
            self._shares_reads, self._shared_read = False, None

    def effective_delta(self) -> torch.Tensor:
        """The delta as it is added to the weight now, with dropout and scale, in its autograd graph. (n,)"""
        return self.delta if self.dropout_step is None and self.scale == 1 else _Scaled.apply(self.delta, self)

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
        g, strips = self.selection.granularity, self.strips()
        edges = torch.tensor([row // g * self.shape[-1] for row in rows], dtype=strips.dtype, device=strips.device)
        starts = torch.searchsorted(strips, edges).tolist()
        self._row_starts |= {row: start * g for row, start in zip(rows, starts, strict=True)}

    def patterns(self, first: int, rows: int, rows_per_pattern: int) -> Iterator[Pattern]:
        """The patterns of rows [first, first + rows) of the weight as a matrix, one for each `rows_per_pattern`."""
        g, columns = self.selection.granularity, self.shape[-1]
        strips = None if self.regenerates and self.selection.is_sliceable else self.strips()
        for start in range(first, first + rows, rows_per_pattern):
            scalars = self.row_slice(start, rows_per_pattern)
            part = slice(scalars.start // g, scalars.stop // g)
            indices = (self.strips(part.start, part.stop) if strips is None else strips[part]) - start // g * columns
            yield Pattern(indices, rows_per_pattern, columns, g)

    def remove(self) -> None:
        """Remove the delta and its buffers from the modules. The parameter keeps its current values."""
        for module, name in self.owners:
            delattr(module, f"{name}_delta")
        module, name = self.owners[0]
        for kind in ("base", "strips"):
            module._buffers.pop(f"{name}_{kind}", None)
            module._non_persistent_buffers_set.discard(f"{name}_{kind}")


def _sum(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return base.to(torch.promote_types(base.dtype, torch.float32)) + delta


class _Scaled(torch.autograd.Function):
    """The identity on the delta, whose backward applies `factor`: the weight has the factor already."""

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, sparse_weight: SparseWeight) -> torch.Tensor:
        ctx.sparse_weight, ctx.dropout_step = sparse_weight, sparse_weight.dropout_step
        # Autograd would make a view of the argument itself
        return delta.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scaled(grad, ctx.sparse_weight, ctx.dropout_step), None


def scaled(gradient: torch.Tensor, weight: SparseWeight, dropout_step: int | None) -> torch.Tensor:
    """Multiply a gradient of the selected scalars, (n,), by `factor`: the gradient of the delta, in its dtype."""
    factor = weight.factor(dropout_step)
    return (gradient if factor is None else gradient * factor).to(weight.delta.dtype)
