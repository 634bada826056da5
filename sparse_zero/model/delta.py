"""The trained delta of a selected parameter: how it is added now, and the gradient of it.

What it is added to is decided by the subclasses: `weight.SparseWeight` writes the sum into the parameter,
`quantized_weight.QuantizedWeight` leaves a packed parameter as it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model import writes
from sparse_zero.model.compiled import number_of
from sparse_zero.model.selected_scalars import SelectedScalars
from sparse_zero.model.setting import Setting
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.selection.checks import checked_chunks
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.hashes import stream_key
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target


class TrainedDelta(SelectedScalars, ABC):
    """The delta of a selected parameter, with the setting under which it is added."""

    is_packed: ClassVar[bool]
    """Whether the parameter is a packed, quantised weight, into which nothing is written."""

    def __init__(
        self,
        target: Target,
        selection: Selection,
        counter: StepCounter,
        config: SparseConfig,
        contents: dict[str, "TrainedDelta"],
        dtype: torch.dtype,
    ) -> None:
        """Create the tensors. `attach` registers them in the modules, and `initialize` fills them.

        Args:
            contents: by parameter name, the weight whose values are in the parameter now. All adapters of a model
                share it.
            dtype: of the delta.
        """
        super().__init__(target, selection, config)
        self.counter, self.contents = counter, contents
        self.dropout = config.dropout
        self.enabled, self.scale = True, 1.0
        self.reference: torch.Tensor | None = None
        """What is kept of the reference (n,); see `model.reference`."""
        self.shows_reference = False
        """Whether the weight has the values of its reference while it is disabled."""
        self.number = number_of(self)
        self.base_has_changed = False
        """Whether other original values were loaded, so that the fingerprint of the base model is no longer right."""
        self.is_plain = False
        """Whether the model was merged or unloaded: what the parameter contains is no longer decided here."""
        self.is_loading = False
        """Whether a state dict is loaded, which says itself what the original values are."""
        self._parked["delta"] = nn.Parameter(torch.empty(selection.count, dtype=dtype, device=self.weight.device))
        counter.add(self)

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

    # How the delta is added now

    @property
    def trains(self) -> bool:
        """Whether a computation now must include the delta in its autograd graph."""
        return self.enabled and torch.is_grad_enabled() and self.delta.requires_grad

    @property
    def scale(self) -> float:
        """The factor of the deltas."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale, self.scale_text = scale, repr(scale)

    @property
    def dropout_step(self) -> int | None:
        """The number of the training forward whose dropout mask applies now; None for no dropout."""
        return self.counter.training_forwards if self.dropout and self.counter.training else None

    @property
    def at_rest(self) -> Setting:
        """The setting outside of forwards."""
        return Setting(self.enabled, self.scale, None, self.shows_reference and not self.enabled)

    @property
    def setting(self) -> Setting:
        """The setting of a forward."""
        return Setting(self.enabled, self.scale, self.dropout_step, self.shows_reference and not self.enabled)

    def factor(self, setting: Setting) -> torch.Tensor | float | None:
        """The factor of the delta: the scale, times the dropout mask (n,) if there is dropout. None for 1."""
        if setting.dropout_step is None:
            return None if setting.scale == 1 else setting.scale
        # Depends on the step only: the same in a recomputation, after stage 3's next gather and on every rank
        generator = torch.Generator(self.delta.device)
        key = stream_key(self.selection.seed, self.selection.name, f"dropout/{setting.dropout_step}")
        generator.manual_seed(abs(key))
        kept = torch.rand(self.selection.count, generator=generator, device=self.delta.device) >= self.dropout
        return kept * (setting.scale / (1 - self.dropout))

    def scaled(self, gradient: torch.Tensor, setting: Setting) -> torch.Tensor:
        """Multiply a gradient of the selected scalars, (n,), by `factor`: the gradient of the delta, in its dtype."""
        factor = self.factor(setting)
        return (gradient if factor is None else gradient * factor).to(self.delta.dtype)

    # What changes

    def delta_state(self) -> tuple:
        """A value that changes when the delta does, as far as autograd counts it."""
        delta = self.delta
        return id(delta), version_of(delta), delta.data_ptr()

    def check_delta_state(self, seen: tuple) -> None:
        """Raise UserError in a backward if the deltas have changed since its forward saw this state."""
        if self.delta_state() != seen:
            raise UserError(
                f"{self.selection.name}: its deltas have changed between a forward and the backward of it; call "
                "backward before optimizer.step(), or repeat the forward"
            )

    def check_not_plain(self) -> None:
        """Raise UserError in a backward after the model was merged or unloaded."""
        if self.is_plain:
            name = self.selection.name
            raise UserError(f"{name}: the model was merged or unloaded between a forward and the backward of it")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = number_of(self)
        self.counter.add(self)

    # What the parameter contains: nothing but the original values, unless a subclass writes into it

    @abstractmethod
    def initialize(self, deltas: torch.Tensor | None = None) -> None:
        """Set the deltas, and what belongs to them. `take_positions` comes before.

        Under ZeRO stage 3, all ranks must call it.

        Args:
            deltas: (n,), real numbers; None for zeros.

        Raises: for a lack of memory only. The parameter is then unchanged.
        """

    @abstractmethod
    def replace(self, parameter: nn.Parameter) -> None:
        """Take another parameter in place of the weight, in all modules that own it: the new original values.

        Raises:
            UserError: it cannot take its place.
        """

    @abstractmethod
    def reference_now(self) -> torch.Tensor:
        """What `reference` is if the present values become the reference: (n,). The delta must be gathered."""

    def refresh(self) -> None:
        """Write the deltas for a forward, unless the weight has them already. Called before each read."""

    def refresh_at_rest(self, checks_data: bool = False) -> None:
        """`writes.refresh` for this weight alone."""

    def due(self, in_forward: bool = False, checks_data: bool = False) -> writes.Due | None:
        """What must be written so that the weight has the deltas. Another adapter's values are removed first.

        Args:
            in_forward: under the setting of a forward, instead of `at_rest`.
            checks_data: also write after changes that autograd does not count, as by `delta.data`. On the CPU a hash
                finds them. Elsewhere a hash would wait for the device: if gradients are enabled, the deltas are
                written again, which takes less time.

        Returns: None if the weight has the deltas already, and under ZeRO stage 3, where gathered copies get them.
        """
        return None

    def write(self, setting: Setting | None = None) -> None:
        """Write W[selected] = w0 + delta, or w0 while disabled. The weight must be gathered.

        If the weight contains the values of another adapter, these are removed first.

        Args: setting: None for `at_rest`.
        """

    def write_partition(self, setting: Setting | None = None) -> None:
        """`write` for a weight that ZeRO stage 3 partitions, so that the partitions get the values. Collective."""

    def take_changed_base(self) -> None:
        """Take the parameter's values as the original ones, if other weights were loaded."""

    def invalidate(self) -> None:
        """Make the next forward write the deltas."""

    def version_at_rest(self) -> int | None:
        """Autograd's version of the parameter if it has the values at rest; None under ZeRO stage 3."""
        return None

    def set_version_at_rest(self, version: int) -> None:
        """Let autograd take what it saved of the parameter at a version, whose values are in it again."""


def version_of(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
