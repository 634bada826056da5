"""One selected parameter: frozen, it carries a trainable 1-D delta at its selected positions.

W[selected] = w0 + delta is written into the parameter itself, so that the model computes as it always did; the
parameter keeps its name and its place in the state dict. Beside a `weight` stand
    weight_delta         Parameter (n,)    trained; at every place of a tied weight
    weight_base          buffer (n,)       w0, the original values, so that unmerging is exact
    weight_row_starts    buffer (R + 1,)   CSR pattern of the positions in the weight as a matrix of R rows, int32;
    weight_column_index  buffer (n,)       from the first gradient on
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_zero.sampled_gradient import csr_pattern, flat_positions
from sparse_zero.selection import Draw, stream_key
from sparse_zero.targets import Target
from sparse_zero.zero import full_shape, gathered, is_partitioned, is_whole


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

    def __init__(self, target: Target, draw: Draw, clock: UpdateClock, dropout: float = 0.0) -> None:
        """Its tensors hold nothing before `begin`."""
        self.owners, self.draw, self.clock, self.dropout = target.owners, draw, clock, dropout
        self.enabled, self.scale = True, 1.0
        self.passes_plain = False
        """Whether readers get the parameter as it is: in the forward of a module that has its own rule."""
        weight = self.weight
        self.shape = full_shape(weight)
        assert draw.count > 0, f"{draw.name}: a delta of length 0 breaks ZeRO stage 3"
        # Under ZeRO the delta follows the weight's dtype, and the float32 original lives in the optimizer's partition.
        dtype = weight.dtype if is_partitioned(weight) else torch.float32
        delta = nn.Parameter(torch.empty(draw.count, dtype=dtype, device=weight.device))
        for module, name in self.owners:
            module.register_parameter(f"{name}_delta", delta)
        self._put_beside("base", torch.empty(draw.count, dtype=weight.dtype, device=weight.device))
        self._written: tuple | None = None
        self._copy_written: tuple | None = None
        self._positions: torch.Tensor | None = None
        """The positions, narrow: until a gradient needs them by rows, and not before anything needs them again."""

    @torch.no_grad()
    def begin(self, chunks: Iterable[torch.Tensor], values: torch.Tensor | None = None) -> None:
        """Keep the original values, and start with these deltas, which are written at once, or with zeros.

        Args: chunks: the positions in the flattened parameter, int64, sorted, some at a time; values: (n,).
        Raises what `chunks` raises; after its last piece the parameter can be given its values back.
        Collective under ZeRO stage 3.
        """
        weight, delta, base = self.weight, self.delta.detach(), self.base
        writes = values is not None and not is_partitioned(weight)
        keeps = None if writes and self.draw.repeatable else self._room_for_positions()
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
            assert start == self.draw.count, (self.draw, start)
        finally:
            self._positions = keeps
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
    def pattern(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(row_starts, column_index) of the selected positions."""
        if not self._has("row_starts"):
            row_starts, column_index = csr_pattern(self.flat_positions(), self.shape[:-1].numel(), self.shape[-1])
            self._put_beside("row_starts", row_starts)
            self._put_beside("column_index", column_index)
            self._positions = None
        return self._beside("row_starts"), self._beside("column_index")

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
        if self._has("row_starts"):
            return flat_positions(*self.pattern, self.shape[-1])
        if self._positions is None:
            flat = self.draw.positions(self.base.device)
            self._positions = self._room_for_positions().copy_(flat)
            return flat
        return self._positions.to(self.base.device, torch.int64)

    def _room_for_positions(self) -> torch.Tensor:
        narrow = torch.int32 if self.shape.numel() < 2**31 else torch.int64
        return torch.empty(self.draw.count, dtype=narrow, device=self.weight.device)

    @torch.no_grad()
    def write(self, forwards: int | None = None) -> None:
        """W[selected] = w0 + delta, or w0 while disabled. The weight must be whole.

        Args: forwards: the training forward whose dropout applies; None: no dropout.
        """
        values = self.base
        if self.enabled:
            factor = self.factor(forwards)
            change = self.delta if factor is None else self.delta * factor
            values = _sum(values, change)
        weight = self.weight
        # A stage-3 copy is written again in each gather, always with the values that the graph already saw, so
        # autograd must not count it as a change. Elsewhere the count protects graphs from before an optimizer step.
        target = weight.data if is_partitioned(weight) else weight.detach()
        target.view(-1).index_copy_(0, self.flat_positions(), values.to(weight.dtype))

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
        generator.manual_seed(abs(stream_key(self.draw.seed, self.draw.name, f"dropout/{forwards}")))
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
        tensor = _ReadGradient.apply(self.delta, weight.detach(), self)
        # What isinstance(tensor, nn.Parameter) asks for: Module.get_parameter, among others, takes nothing else.
        tensor._is_param = True
        return tensor

    def remove(self) -> None:
        """Take the delta and its buffers off the module; the weight stays as it is."""
        for module, name in self.owners:
            delattr(module, f"{name}_delta")
        module, name = self.owners[0]
        for kind in ("base", "row_starts", "column_index"):
            module._buffers.pop(f"{name}_{kind}", None)
            module._non_persistent_buffers_set.discard(f"{name}_{kind}")


def _sum(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return base.to(torch.promote_types(base.dtype, torch.float32)) + change


class _ReadGradient(torch.autograd.Function):
    """The parameter; its backward picks the delta's gradient out of the parameter's."""

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, weight: torch.Tensor, sparse_weight: SparseWeight) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.sparse_weight, ctx.forwards = sparse_weight, sparse_weight.dropping
        # Not the argument itself, of which autograd would make a view
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        weight = ctx.sparse_weight
        picked = grad.reshape(-1).index_select(0, weight.flat_positions())
        return scaled(picked, weight, ctx.forwards), None, None


def scaled(gradient: torch.Tensor, weight: SparseWeight, forwards: int | None) -> torch.Tensor:
    """The delta's gradient as the forward of that number used it: dropped, scaled, in the delta's dtype."""
    factor = weight.factor(forwards)
    return (gradient if factor is None else gradient * factor).to(weight.delta.dtype)
