"""The values of a selected weight: w0 + factor * delta at the selected positions, and how they are written."""

from collections.abc import Callable

import torch

from sparse_zero.gradient import cpu
from sparse_zero.gradient.cost import has_kernels
from sparse_zero.gradient.pattern import Pattern
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.flat_view import FlatView
from sparse_zero.model.setting import Setting
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.writes import Operands
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target
from sparse_zero.selection.unsupported import no_values
from sparse_zero.zero.parameters import is_partitioned


class WeightValues(TrainedDelta):
    """The deltas and the original values of a selected parameter."""

    def __init__(
        self,
        target: Target,
        selection: Selection,
        counter: StepCounter,
        config: SparseConfig,
        contents: dict[str, TrainedDelta],
    ) -> None:
        weight = target.parameter
        # Under ZeRO stage 3 the delta has the weight's dtype; the optimizer's partition has its float32 values
        dtype = weight.dtype if is_partitioned(weight) else torch.float32
        super().__init__(target, selection, counter, config, contents, dtype)
        self._parked["base"] = torch.empty(selection.count, dtype=weight.dtype, device=weight.device)

    def reference_now(self) -> torch.Tensor:
        """The values at the positions, in the weight's dtype."""
        return add_delta(self.base, self.delta.detach() * self.scale).to(self.base.dtype)

    def operands(self, values: torch.Tensor, setting: Setting) -> Operands | None:
        """What the operator or the kernel needs to write this weight together with others.

        Args: values, setting: as for `write_values`.

        Returns: None if only `write_values` can write it.
        """
        is_plain_sum = not setting.enabled or (setting.scale == 1 and setting.dropout_step is None)
        if not is_plain_sum or self.regenerates or not values.is_contiguous() or not self._kernels_support(None):
            return None
        if self.selection.columns is not None:  # its strips are indices into drawn columns, not into the weight
            return None
        if not cpu.loaded_operators(values) and (not has_kernels(values) or values.element_size() > 4):
            return None
        change = self.delta.detach() if setting.enabled else None
        base = self._originals(setting)
        return Operands(values, base, change, self.strips(), self.shape[-1], self.selection.granularity)

    @torch.no_grad()
    def write_values(self, values: torch.Tensor, setting: Setting) -> None:
        """Args: values: the complete weight, whose version counter autograd counts, or not."""
        if values.is_meta or self.delta.is_meta:  # the model was offloaded after `sparsify`
            raise no_values(self.selection.name, [module for module, _ in self.owners])
        factor = self.factor(setting) if setting.enabled else None
        if self.selection.fills_columns:
            self._write_columns(values, setting, factor)
            return
        whole = FlatView(values)
        write_strips = self._strip_writer(whole.flat) if self._kernels_support(factor) else None
        scalars_per_index = self.selection.granularity if write_strips else 1
        base_values, start = self._originals(setting), 0
        for indices in self._weight_strip_chunks() if write_strips else self._flat_chunks():
            chunk = slice(start, start + indices.numel() * scalars_per_index)
            base, delta = base_values[chunk], None
            if setting.enabled:
                delta = self.delta.detach()[chunk]
                if factor is not None:
                    delta = delta * (factor[chunk] if isinstance(factor, torch.Tensor) else factor)
            if write_strips:
                write_strips(whole.flat, base, delta, indices)
            else:
                whole.write(indices, base if delta is None else add_delta(base, delta).to(base.dtype))
            start = chunk.stop

    def _originals(self, setting: Setting) -> torch.Tensor:
        """The values under the deltas, (n,): the original ones, or those of the reference policy."""
        if setting.is_reference:
            # A plain tensor: it does not move with the model
            self.reference = self.reference.to(self.base.device)
            return self.reference
        return self.base

    def _write_columns(self, values: torch.Tensor, setting: Setting, factor: torch.Tensor | float | None) -> None:
        """`write_values` of columns that are trained whole."""
        columns, inner = self.selection.columns, self._originals(setting)
        if setting.enabled:
            delta = self.delta.detach()
            inner = add_delta(inner, delta if factor is None else delta * factor).to(inner.dtype)
        drawn = self.columns[: columns.count]
        values.index_copy_(columns.axis, drawn, inner.view(self.selection.inner_shape).to(values.dtype))

    def _strip_writer(self, whole: torch.Tensor | None) -> Callable[..., None] | None:
        """A function of (matrix, base, delta, strip_indices) that writes base + delta in one kernel; None if the
        device has none."""
        columns, g = self.shape[-1], self.selection.granularity
        if whole is None:
            return None
        if operators := cpu.loaded_operators(whole):
            return lambda *tensors: operators.write_deltas.default(*tensors, columns, g)
        if not has_kernels(whole) or whole.element_size() > 4:
            return None
        from sparse_zero.gradient.triton_kernels import write_deltas

        rows = self.shape[:-1].numel()
        return lambda matrix, base, delta, strips: write_deltas(matrix, base, delta, Pattern(strips, rows, columns, g))

    def _kernels_support(self, factor: torch.Tensor | float | None) -> bool:
        """Whether the operator and the kernel that write strips support the dtypes of `write`."""
        supported = {self.weight.dtype, torch.float32}
        given = {self.delta.dtype, factor.dtype if isinstance(factor, torch.Tensor) else torch.float32}
        return given <= supported and self.base.dtype == self.weight.dtype


def add_delta(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sum in at least float32."""
    return base.to(torch.promote_types(base.dtype, torch.float32)) + delta
