"""One selected parameter: frozen, it carries a trainable 1-D delta at its selected positions.

W[selected] = w0 + delta is written into the parameter itself, so that the model computes as it always did; the
parameter keeps its name and its place in the state dict. Beside a `weight` stand
    weight_delta         Parameter (n,)    trained; at every place of a tied weight
    weight_base          buffer (n,)       w0, the original values, so that unmerging is exact
    weight_strips        buffer (n / g,)   where its strips are (see pattern.py), int32 (int64 in a grid of 2**31);
                                           not before it is needed again, and never where it is regenerated
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.model.readers import readable
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection, in_chunks, stream_key
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import full_shape, gathered, is_partitioned, is_whole


class UpdateClock:
    """Counts optimizer steps, so that deltas are written into their weights once per step, not once per forward.

    DeepSpeed updates parameters through flat buffers, which a tensor's version counter does not see; but every
    optimizer, DeepSpeed's too, runs torch's optimizer hooks.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.passes = 0
        """Forwards of the model so far."""
        self.forwards = 0
        """Training forwards of the model so far: each drops other deltas, where there is dropout."""
        self.training = False
        reference = weakref.ref(self)

        def tick(*_: Any) -> None:
            if clock := reference():
                clock.steps += 1

        weakref.finalize(self, register_optimizer_step_post_hook(tick).remove)

    def before_forward(self, model: nn.Module, _: Any) -> None:
        """A forward pre-hook of the model as a whole: a layer may run several times in one forward."""
        self.training = model.training
        self.passes += 1
        self.forwards += model.training

    def __deepcopy__(self, memo: dict) -> "UpdateClock":
        return self  # a copied model is trained by optimizers too

    def __reduce__(self) -> tuple:
        return UpdateClock, ()  # a pickled model needs a hook in the process that opens it


class SparseWeight:
    """One selected parameter: where its tensors are, and how they go into the parameter."""

    def __init__(self, target: Target, selection: Selection, clock: UpdateClock, config: SparseConfig) -> None:
        """Its tensors hold nothing before `begin`."""
        self.owners, self.selection, self.clock = target.owners, selection, clock
        self.dropout, self.transient_bytes = config.dropout, config.transient_mib * 2**20
        self.regenerates = config.indices == "regenerated" and selection.can_regenerate
        self.enabled, self.scale = True, 1.0
        self.passes_plain = False
        """Whether readers get the parameter as it is: in the forward of a module that has its own rule."""
        weight = self.weight
        self.shape = full_shape(weight) or torch.Size([1])
        assert selection.count > 0, f"{selection.name}: a delta of length 0 breaks ZeRO stage 3"
        # Under ZeRO the delta follows the weight's dtype, and the float32 original lives in the optimizer's partition.
        dtype = weight.dtype if is_partitioned(weight) else torch.float32
        delta = nn.Parameter(torch.empty(selection.count, dtype=dtype, device=weight.device))
        for module, name in self.owners:
            module.register_parameter(f"{name}_delta", delta)
        self._put_beside("base", torch.empty(selection.count, dtype=weight.dtype, device=weight.device))
        self.told_of_dense_gradient = False
        self._reads_once = False
        self._reading: torch.Tensor | None = None
        self._edges: dict[int, int] = {}
        """Where the scalars of some rows begin."""
        self._written: tuple | None = None
        self._copy_written: tuple | None = None

    @torch.no_grad()
    def begin(self, chunks: Iterable[torch.Tensor], values: torch.Tensor | None = None) -> None:
        """Keep the original values, and start with these deltas, which are written at once, or with zeros.

        Args: chunks: the positions in the flattened parameter, int64, sorted, some at a time; values: (n,).
        Raises what `chunks` raises; after its last piece the parameter can be given its values back.
        Collective under ZeRO stage 3.
        """
        weight, delta, base = self.weight, self.delta.detach(), self.base
        writes = values is not None and not is_partitioned(weight)
        spares = self.regenerates or self.selection.granularity > 1 or (writes and self.selection.can_regenerate)
        keeps = None if spares else self._room_for_strips(self.selection.strip_count)
        if values is None:
            delta.zero_()
        start = 0
        try:
            with gathered([weight]):
                whole = weight.detach().view(-1)
                # What was drawn, and what was read to be kept, is still in the cache when the sum is written
                for flat in chunks:
                    piece = slice(start, start + flat.numel())
                    torch.index_select(whole, 0, flat, out=base[piece])
                    if values is not None:
                        delta[piece] = values[piece]
                    if writes:
                        whole.index_copy_(0, flat, _sum(base[piece], delta[piece]).to(whole.dtype))
                    if keeps is not None:
                        keeps[piece] = flat
                    start = piece.stop
            assert start == self.selection.count, (self.selection, start)
        finally:
            if keeps is not None:
                self._put_beside("strips", keeps)
            if writes:
                self._written = self._state(self.dropping)

    @property
    def weight(self) -> nn.Parameter:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def delta(self) -> nn.Parameter:
        return self._beside("delta")

    @property
    def base(self) -> torch.Tensor:
        return self._beside("base")

    @property
    def pattern(self) -> Pattern:
        """The selected positions in the parameter as a matrix."""
        return self._pattern_of(self.strips())

    def _pattern_of(self, strips: torch.Tensor) -> Pattern:
        return Pattern(strips, self.shape[:-1].numel(), self.shape[-1], self.selection.granularity)

    def strips(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Returns: strips [start, stop) in the narrowest dtype, as Selection.strip_chunks has them."""
        if self._has("strips"):
            strips = self._beside("strips")
            return strips if start == 0 and stop is None else strips[start:stop]
        if not self.regenerates:
            self._put_beside("strips", self._drawn(0, self.selection.strip_count))
            return self.strips(start, stop)
        return self._drawn(start, self.selection.strip_count if stop is None else stop)

    def _drawn(self, start: int, stop: int) -> torch.Tensor:
        strips, filled = self._room_for_strips(stop - start), 0
        for chunk in self.selection.strip_chunks(self.base.device, start, stop):
            strips[filled : filled + chunk.numel()] = chunk
            filled += chunk.numel()
        return strips

    def _beside(self, kind: str) -> torch.Tensor:
        module, name = self.owners[0]
        return getattr(module, f"{name}_{kind}")

    def _put_beside(self, kind: str, value: torch.Tensor) -> None:
        module, name = self.owners[0]
        module.register_buffer(f"{name}_{kind}", value, persistent=False)

    def _has(self, kind: str) -> bool:
        module, name = self.owners[0]
        return f"{name}_{kind}" in module._buffers

    @property
    def trains(self) -> bool:
        """Whether what is computed now leads a gradient to the delta."""
        return self.enabled and torch.is_grad_enabled() and self.delta.requires_grad

    def flat_positions(self) -> torch.Tensor:
        """Returns: int64 (n,), the selected positions in the flattened parameter."""
        return torch.cat([*self._flat_chunks()])

    def _flat_chunks(self) -> Iterator[torch.Tensor]:
        """`flat_positions`, some at a time."""
        if self.selection.granularity > 1:
            yield from self.pattern.flat_chunks()
        elif self.regenerates:
            yield from self.selection.chunks(self.base.device)
        else:
            yield from (strips.long() for strips in in_chunks(self.strips()))

    def _cell_chunks(self) -> Iterator[torch.Tensor]:
        """The cells of the strips (see pattern.py): all at once, or of single ones that are regenerated, some."""
        if self.regenerates and self.selection.granularity == 1:
            yield from self.selection.chunks(self.base.device)
        else:
            yield self.strips()

    def _room_for_strips(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=self.selection.strip_dtype, device=self.weight.device)

    @torch.no_grad()
    def write(self, forwards: int | None = None) -> None:
        """W[selected] = w0 + delta, or w0 while disabled. The weight must be whole.

        Args: forwards: the training forward whose dropout applies; None: no dropout.
        """
        factor = self.factor(forwards)
        weight = self.weight
        # A stage-3 copy is written again in each gather, always with the values that the graph already saw, so
        # autograd must not count it as a change. Elsewhere the count protects graphs from before an optimizer step.
        whole = (weight.data if is_partitioned(weight) else weight.detach()).view(-1)
        writes_cells = self._cell_writer(whole) if self._is_plain(factor) else None
        scalars_of_cell = self.selection.granularity if writes_cells else 1
        start = 0
        for cells in self._cell_chunks() if writes_cells else self._flat_chunks():
            piece = slice(start, start + cells.numel() * scalars_of_cell)
            values, change = self.base[piece], None
            if self.enabled:
                change = self.delta.detach()[piece]
                if factor is not None:
                    change = change * (factor[piece] if isinstance(factor, torch.Tensor) else factor)
            if writes_cells:
                writes_cells(whole, values, change, cells)
            else:
                values = values if change is None else _sum(values, change).to(weight.dtype)
                whole.index_copy_(0, cells, values)
            start = piece.stop

    def _cell_writer(self, whole: torch.Tensor) -> Callable[..., None] | None:
        """What writes base + change at the scalars of cells in one go, where the weight is."""
        columns, g = self.shape[-1], self.selection.granularity
        if operators := cpu.loaded_operators(whole):
            return lambda *tensors: operators.write_deltas.default(*tensors, columns, g)
        if not has_kernels(whole) or whole.element_size() > 4:
            return None
        from sparse_zero.gradient.triton_kernels import write_deltas

        return lambda matrix, base, change, cells: write_deltas(matrix, base, change, self._pattern_of(cells))

    def _is_plain(self, factor: torch.Tensor | float | None) -> bool:
        """Whether `write` has dtypes to do with that operator and kernel take."""
        taken = {self.weight.dtype, torch.float32}
        given = {self.delta.dtype, factor.dtype if isinstance(factor, torch.Tensor) else torch.float32}
        return given <= taken and self.base.dtype == self.weight.dtype

    @property
    def is_written(self) -> bool:
        """Whether the parameter itself, and not only what is gathered of it, holds the deltas."""
        return self._written is not None

    def refresh(self) -> None:
        """Write, unless the weight already holds these values. Called whenever the weight is about to be read."""
        if is_partitioned(self.weight):
            if is_whole(self.weight):
                self.refresh_copy(self.dropping)
        elif self._written != self._state(self.dropping):
            self.write(self.dropping)
            self._written = self._state(self.dropping)

    def refresh_copy(self, forwards: int | None) -> None:
        """Write into what stage 3 has gathered, unless it is the copy that this pass of the model has written.

        Most models are small enough to stay gathered from forward to backward; a gather makes a tensor of its own.
        Args: as of `write`.
        """
        weight, delta = self.weight, self.delta
        copies = (StorageWeakRef(tensor.untyped_storage()) for tensor in (weight, delta))
        state = self.clock.passes, *self._state(forwards), *copies
        if self._copy_written != state:
            self.write(forwards)
            self._copy_written = state

    @property
    def dropping(self) -> int | None:
        """The training forward whose dropout applies now; None where none does."""
        return self.clock.forwards if self.dropout and self.clock.training else None

    def factor(self, forwards: int | None) -> torch.Tensor | float | None:
        """What the delta is multiplied with: the scale, and with dropout a mask (n,); None for 1."""
        if forwards is None:
            return None if self.scale == 1 else self.scale
        # A function of the forward: the same in a recomputation, in stage 3's next gather and on every rank.
        generator = torch.Generator(self.delta.device)
        generator.manual_seed(abs(stream_key(self.selection.seed, self.selection.name, f"dropout/{forwards}")))
        kept = torch.rand(self.base.numel(), generator=generator, device=self.delta.device) >= self.dropout
        return kept * (self.scale / (1 - self.dropout))

    def _state(self, forwards: int | None) -> tuple:
        """Changes whenever the weight might not hold w0 + delta: a step, a load, an assignment, a disabled adapter."""
        weight, delta = self.weight, self.delta
        tensors = (id(delta), delta._version, id(weight), weight._version)
        return self.clock.steps, self.enabled, self.scale, forwards, *tensors

    def invalidate(self) -> None:
        """Make the next forward write again: the delta was changed behind autograd's back (`delta.data`)."""
        self._written = self._copy_written = None

    def __getstate__(self) -> dict[str, Any]:
        # No two objects may hold one weak reference to a storage
        return self.__dict__ | {"_copy_written": None}

    def read(self) -> torch.Tensor:
        """The parameter as its module and other readers see it."""
        self.refresh()
        weight = self.weight
        if self.passes_plain or not self.trains or not is_whole(weight):
            return weight
        tensor = readable(self) if self._reading is None else self._reading
        # What isinstance(tensor, nn.Parameter) asks for: Module.get_parameter, among others, takes nothing else.
        tensor._is_param = True
        if self._reads_once:
            self._reading = tensor
        return tensor

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Within this block, one forward of a module, all readers get the same tensor: experts that are read one by
        one then share one gradient of the delta."""
        self._reads_once = True
        try:
            yield
        finally:
            self._reads_once, self._reading = False, None

    def change(self) -> torch.Tensor:
        """(n,), the delta as it is in the weight now: dropped and scaled, in its graph."""
        return self.delta if self.dropping is None and self.scale == 1 else _Scaled.apply(self.delta, self)

    def span(self, first: int, rows: int) -> slice:
        """Which of the selected scalars lie in some rows of the weight as a matrix, whole blocks of them."""
        if not self._edges:
            # One wait for the accelerator, for all experts at once
            each = self.shape[-2] if len(self.shape) > 1 else 1
            self._find_edges(range(0, self.shape[:-1].numel() + 1, each))
        if missing := [row for row in (first, first + rows) if row not in self._edges]:
            self._find_edges(missing)
        return slice(self._edges[first], self._edges[first + rows])

    def _find_edges(self, rows: Sequence[int]) -> None:
        g, strips = self.selection.granularity, self.strips()
        cells = torch.tensor([row // g * self.shape[-1] for row in rows], dtype=strips.dtype, device=strips.device)
        starts = torch.searchsorted(strips, cells).tolist()
        self._edges |= {row: start * g for row, start in zip(rows, starts, strict=True)}

    def patterns(self, first: int, rows: int, each: int) -> Iterator[Pattern]:
        """Of some rows of the weight as a matrix, `each` at a time, as matrices of their own."""
        g, columns = self.selection.granularity, self.shape[-1]
        whole = None if self.regenerates and self.selection.is_sliceable else self.strips()
        for start in range(first, first + rows, each):
            span = self.span(start, each)
            some = slice(span.start // g, span.stop // g)
            cells = (self.strips(some.start, some.stop) if whole is None else whole[some]) - start // g * columns
            yield Pattern(cells, each, columns, g)

    def remove(self) -> None:
        """Take the delta and its buffers off the module; the weight stays as it is."""
        for module, name in self.owners:
            delattr(module, f"{name}_delta")
        module, name = self.owners[0]
        for kind in ("base", "strips"):
            module._buffers.pop(f"{name}_{kind}", None)
            module._non_persistent_buffers_set.discard(f"{name}_{kind}")


def _sum(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return base.to(torch.promote_types(base.dtype, torch.float32)) + change


class _Scaled(torch.autograd.Function):
    """The delta; its backward drops and scales what arrives, as `factor` says of this forward."""

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, sparse_weight: SparseWeight) -> torch.Tensor:
        ctx.sparse_weight, ctx.forwards = sparse_weight, sparse_weight.dropping
        # Not the argument itself, of which autograd would make a view
        return delta.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scaled(grad, ctx.sparse_weight, ctx.forwards), None


def scaled(gradient: torch.Tensor, weight: SparseWeight, forwards: int | None) -> torch.Tensor:
    """The delta's gradient as the forward of that number used it: dropped, scaled, in the delta's dtype."""
    factor = weight.factor(forwards)
    return (gradient if factor is None else gradient * factor).to(weight.delta.dtype)
