"""A selected parameter: it is frozen and has a trainable 1-D delta for its n selected positions.

W[selected] = w0 + delta is written into the parameter itself, so that the model's own forward uses it. The parameter
keeps its name and its entry in the state dict. This module decides what the parameter contains, and when:
- after `write` it has the deltas, or the original values while the adapter is disabled;
- `refresh` writes again if the deltas, or the setting under which they were written, have changed;
- `restore` puts back, for a backward, what its forward has seen.
"""

from typing import Any, NamedTuple

import torch
import xxhash
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_zero.errors import UserError
from sparse_zero.model import reads, writes
from sparse_zero.model.delta import TrainedDelta, version_of
from sparse_zero.model.flat_view import FlatView
from sparse_zero.model.refusals import refuse_transforms
from sparse_zero.model.setting import BASE, Setting
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight_tensor import as_weight_tensor
from sparse_zero.model.weight_values import WeightValues, add_delta
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target
from sparse_zero.zero.parameters import full_shape, gathered, is_partitioned, is_whole


class Seen(NamedTuple):
    """What a forward has seen in a weight."""

    setting: Setting
    delta: tuple


class SparseWeight(WeightValues):
    """A selected parameter and its tensors. It writes the deltas into the parameter, and creates what reads return."""

    is_packed = False

    def __init__(
        self,
        target: Target,
        selection: Selection,
        counter: StepCounter,
        config: SparseConfig,
        contents: dict[str, TrainedDelta],
    ) -> None:
        super().__init__(target, selection, counter, config, contents)
        self.warned_of_dense_gradient = False
        self._written: tuple | None = None
        """The setting and the `_state` that were last written into the parameter."""
        self._delta_hash: int | None = None
        """The hash of the deltas that were last written."""
        self._copy_written: tuple | None = None
        """The state that was last written into the copy that ZeRO stage 3 gathered."""

    @torch.no_grad()
    def initialize(self, deltas: torch.Tensor | None = None) -> None:
        """Save the original values, and set the deltas. Given deltas are also written into the parameter.

        `take_positions` comes before. Under ZeRO stage 3, all ranks must call it.

        Args:
            deltas: (n,), real numbers; None for zeros.

        Raises: for a lack of memory only. The parameter is then unchanged.
        """
        weight, delta, base = self.weight, self.delta.detach(), self.base
        writes, start = deltas is not None and not is_partitioned(weight), 0
        if deltas is None:
            delta.zero_()
        with gathered([weight]):
            whole = FlatView(weight.detach())
            try:
                # In one loop: the positions and values of a chunk are still in the cache when the sum is written
                for flat in self._flat_chunks():
                    chunk = slice(start, start + flat.numel())
                    base[chunk] = whole.read(flat)
                    if deltas is not None:
                        delta[chunk] = deltas[chunk]
                    start = chunk.stop
                    if writes:
                        whole.write(flat, add_delta(base[chunk], delta[chunk]).to(base.dtype))
            except BaseException:
                if writes:
                    self._put_back(whole, start)
                raise
        if not is_partitioned(weight):  # without deltas, w0 + 0 is there already
            self.note_written(self.at_rest)

    def _put_back(self, whole: FlatView, count: int) -> None:
        """Write the first `count` original values, and nothing at the other positions."""
        start = 0
        for flat in self._flat_chunks():
            if start >= count:
                return
            whole.write(flat, self.base[start : start + flat.numel()])
            start += flat.numel()

    @torch.no_grad()
    def take_base(self) -> None:
        """Take the parameter's values at the positions as the original values. The deltas stay."""
        self.base.copy_(self.values_at_positions())
        self.base_has_changed = True
        self.contents.pop(self.selection.name, None)
        self.invalidate()

    def take_changed_base(self) -> None:
        if not self.is_partitioned and not torch.equal(self.values_at_positions(), self.base):
            self.take_base()

    def replace(self, parameter: nn.Parameter) -> None:
        """Take another parameter in place of the weight, in all modules that own it: the new original values.

        Raises:
            UserError: another shape, or the parameter belongs to another selected weight.
        """
        source = getattr(parameter, "_sparse_weight", None)
        if source is self or parameter is self.weight:
            return
        others = [weight for weight in self.counter.weights if weight is not self and weight.is_attached]
        if source is not None or any(parameter is weight.weight for weight in others):
            raise UserError(
                f"{self.selection.name}: tie weights before sparsify, or call unload(model) or merge_and_unload(model)"
            )
        if parameter.shape != (shape := full_shape(self.weight)):
            raise UserError(
                f"{self.selection.name}: has shape {list(shape)}, the new weight {list(parameter.shape)}; change "
                "shapes before sparsify, or call unload(model) or merge_and_unload(model) first"
            )
        self.set_parameter(parameter)
        if not self.is_loading:
            self.take_base()
            self.refresh_at_rest()

    def set_parameter(self, parameter: nn.Parameter) -> None:
        """Register a parameter as the weight, frozen, in all modules that own it."""
        for module, name in self.owners:
            module._parameters[name] = parameter.requires_grad_(False)

    # What a computation sees

    @property
    def seen(self) -> Seen:
        """What a forward sees now; see `restore`."""
        return Seen(self.setting, self.delta_state())

    def read(self) -> torch.Tensor:
        """The tensor that an access to the module's parameter returns."""
        if self in reads.here.plain:  # it was refreshed at the beginning of the block
            return self.weight
        self.refresh()
        weight = self.weight
        if not self.trains or not is_whole(weight):
            return weight
        refuse_transforms(self.selection.name)
        tensor = reads.here.shared.get(self)
        if tensor is None:
            tensor = as_weight_tensor(self)
            # Makes isinstance(tensor, nn.Parameter) true, which Module.get_parameter, among others, requires
            tensor._is_param, tensor._sparse_weight = True, self
        if self in reads.here.shared:
            reads.here.shared[self] = tensor
        return tensor

    def effective_delta(self) -> torch.Tensor:
        """The delta as it is added to the weight now, with dropout and scale, in its autograd graph. (n,)"""
        return self.delta if self.dropout_step is None and self.scale == 1 else _Scaled.apply(self.delta, self)

    # What the parameter contains

    def refresh(self) -> None:
        """Write the deltas for a forward, unless the weight has them already. Called before each read."""
        if is_partitioned(self.weight):
            if is_whole(self.weight):
                self.refresh_copy(self.setting)
        elif not self._has(self.setting):
            self.write(self.setting)

    def refresh_at_rest(self, checks_data: bool = False) -> None:
        """`writes.refresh` for this weight alone."""
        writes.refresh([self], checks_data=checks_data)

    def due(self, in_forward: bool = False, checks_data: bool = False) -> writes.Due | None:
        if self.is_partitioned:
            return None
        setting = self.setting if in_forward else self.at_rest
        on_cpu = self.delta.device.type == "cpu"
        if not (self._has_by_hash(setting) if checks_data and on_cpu else self._has(setting)):
            self._remove_other()
            return writes.Due(self, self.weight.detach(), setting, is_new=True)
        if checks_data and not on_cpu and torch.is_grad_enabled():
            return writes.Due(self, self.weight.data, setting, is_new=False)
        return None

    def restore(self, seen: Seen) -> None:
        """Put back what a forward has seen, for its backward.

        Raises:
            UserError: the deltas have changed since.
        """
        if is_partitioned(self.weight):
            self.refresh_copy(seen.setting)
            return
        self.check_not_plain()
        self.check_delta_state(seen.delta)
        if not self._has(seen.setting):
            self.write(seen.setting)
            if not self.is_attached:  # the active adapter may have no deltas in this weight, and would not write it
                torch.autograd.Variable._execution_engine.queue_callback(self._take_out)

    def _take_out(self) -> None:
        if not self.is_attached and self.contents.get(self.selection.name) is self:
            self.write(BASE)

    def write(self, setting: Setting | None = None) -> None:
        """Write W[selected] = w0 + delta, or w0 while disabled. The weight must be gathered.

        If the weight contains the values of another adapter, these are removed first.

        Args: setting: None for `at_rest`.
        """
        setting, weight = self.at_rest if setting is None else setting, self.weight
        if is_partitioned(weight):
            # A stage-3 copy is written after each gather with the values that the graph has seen, so autograd must not
            # count a change. Otherwise the count makes backward fail for graphs from before an optimizer step.
            self.write_values(weight.data, setting)
            return
        self._remove_other()
        self.write_values(weight.detach(), setting)
        self.note_written(setting)

    def _remove_other(self) -> None:
        other = self.contents.get(self.selection.name)
        if other is not None and other is not self:
            other.write(BASE)

    def write_partition(self, setting: Setting | None = None) -> None:
        if self.is_partitioned:
            with gathered([self.weight, self.delta], write=True):
                self.write(setting)

    def refresh_copy(self, setting: Setting) -> None:
        """Write into the copy that ZeRO stage 3 gathered, unless this forward of the model has written it already.

        A small weight often stays gathered from forward to backward. Each gather allocates a new tensor.
        """
        weight, delta = self.weight, self.delta
        copies = (StorageWeakRef(tensor.untyped_storage()) for tensor in (weight, delta))
        state = self.counter.forwards, setting, self._state(), *copies
        if self._copy_written != state:
            self.write_values(weight.data, setting)
            self._copy_written = state

    def _has(self, setting: Setting) -> bool:
        """Whether the parameter contains the current deltas under this setting."""
        return self._written == (setting, self._state()) and self.contents.get(self.selection.name) is self

    def _has_by_hash(self, setting: Setting) -> bool:
        """`_has` on a CPU, which also finds changes that autograd does not count, and finds none in steps of an
        optimizer of another model."""
        if self._written is None:
            return False
        written, (_, *before) = self._written
        count, *now = self._state()
        if self.contents.get(self.selection.name) is not self or (written, before) != (setting, now):
            return False
        if self._delta_hash != _hash(self.delta):
            return False
        self._written = setting, (count, *now)
        return True

    def note_written(self, setting: Setting) -> None:
        """Note that the weight contains the current deltas under this setting."""
        self.contents[self.selection.name] = self
        self._written = setting, self._state()
        self._delta_hash = _hash(self.delta) if self.delta.device.type == "cpu" else None

    def version_at_rest(self) -> int | None:
        """Autograd's version of the parameter if it has the values at rest; None under ZeRO stage 3."""
        return None if self.is_partitioned or not self._has(self.at_rest) else version_of(self.weight)

    def set_version_at_rest(self, version: int) -> None:
        """Let autograd take what it saved of the parameter at a version, whose values are in it again."""
        torch._C._autograd._unsafe_set_version_counter((self.weight,), (version,))
        self.note_written(self.at_rest)

    def _state(self) -> tuple:
        """A value that changes when w0 + delta may no longer be in the weight: after a step, a load, an assignment."""
        weight = self.weight
        return self.counter.steps, self.delta_state(), id(weight), version_of(weight), weight.data_ptr()

    def invalidate(self) -> None:
        """Make the next forward write the deltas."""
        self._written = self._copy_written = None

    def __getstate__(self) -> dict[str, Any]:
        # A StorageWeakRef must not be copied
        return self.__dict__ | {"_copy_written": None}


def _hash(delta: torch.Tensor) -> int:
    values = delta.detach().contiguous()
    # numpy has no bfloat16
    return xxhash.xxh3_64_intdigest((values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy())


class _Scaled(torch.autograd.Function):
    """The identity on the delta, whose backward applies `factor`: the weight has the factor already."""

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, sparse_weight: SparseWeight) -> torch.Tensor:
        ctx.sparse_weight, ctx.setting = sparse_weight, sparse_weight.setting
        # Autograd would make a view of the argument itself
        return delta.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.sparse_weight.scaled(grad, ctx.setting), None
