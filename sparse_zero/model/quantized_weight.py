"""A selected weight that is quantised: nothing is written into it, and the product of its layer adds the deltas.

w0 is the dequantised value. The weight is never dequantised as a whole: a layer's product makes a copy of its own.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.model.delta import TrainedDelta
from sparse_zero.model.flat_view import FlatView
from sparse_zero.model.setting import Setting
from sparse_zero.model.step_counter import StepCounter
from sparse_zero.model.weight_values import add_delta
from sparse_zero.quantized.formats import quantized_layer
from sparse_zero.quantized.layer import QuantizedLayer
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.draws import in_chunks
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.targets import Target


class QuantizedWeight(TrainedDelta):
    """The deltas of a packed weight (out, in), n selected scalars, K drawn columns."""

    is_packed = True

    def __init__(
        self,
        target: Target,
        selection: Selection,
        counter: StepCounter,
        config: SparseConfig,
        contents: dict[str, TrainedDelta],
    ) -> None:
        super().__init__(target, selection, counter, config, contents, torch.float32)

    @property
    def layer(self) -> QuantizedLayer:
        module, _ = self.owners[0]
        return quantized_layer(module)

    @property
    def device(self) -> torch.device:
        return self.delta.device

    @torch.no_grad()
    def initialize(self, deltas: torch.Tensor | None = None) -> None:
        if deltas is None:
            self.delta.zero_()
        else:
            self.delta.copy_(deltas)

    def replace(self, parameter: nn.Parameter) -> None:
        if parameter is not self.weight:
            raise UserError(
                f"{self.selection.name}: is quantised, and cannot get another weight: load the other base model, and "
                "call sparsify or load_adapter again"
            )

    def refusal_of(self, state: Mapping[str, torch.Tensor], key: str) -> str | None:
        """Why the base of a state dict is not that of this layer; None if it is, or is not in it.

        Args: key: that of the packed weight.
        """
        if key not in state or self.is_partitioned:
            return None
        layer = self.layer
        for name, tensor in layer.state().items():
            given = state.get(key.removesuffix(layer.name) + name)
            if given is None or not layer.is_equal(given, tensor):
                return (
                    f"{key}: the state dict has another quantised base, or none; load the base model of it with "
                    "from_pretrained, and then the state dict or the adapter"
                )
        return None

    def reference_now(self) -> torch.Tensor:
        """The deltas."""
        return self.delta.detach() * self.scale

    # What is added

    def added(self, setting: Setting) -> torch.Tensor | None:
        """What is added to w0 at the positions, (n,); None for nothing."""
        if setting.is_reference:
            self.reference = self.reference.to(self.device)
            return self.reference
        if not setting.enabled:
            return None
        factor, delta = self.factor(setting), self.delta.detach()
        return delta if factor is None else delta * factor

    def added_matrix(self, added: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A dense matrix of it, zero elsewhere: (out, K) for the drawn `columns`, as they are padded, or (out, in).

        Args: added: (n,)
        """
        rows, width = self._inner_shape
        if self.selection.fills_columns:
            if self.columns.numel() == width:
                return added.view(rows, width).to(dtype)
            matrix = added.new_zeros(rows, self.columns.numel(), dtype=dtype)
            matrix[:, :width] = added.view(rows, width)
            return matrix
        matrix = added.new_zeros(rows, width, dtype=dtype)
        flat = matrix.view(-1)
        if self.selection.columns is None:
            self._add_at_positions(matrix, added)
        else:
            for start, strips in _starts(in_chunks(self.strips())):
                flat.index_copy_(0, strips.long(), added[start : start + strips.numel()].to(dtype))
        return matrix

    def add_to(self, values: torch.Tensor, added: torch.Tensor) -> None:
        """Add it to a dequantised copy, in place.

        Args: values: (out, in). added: (n,)
        """
        if not self.selection.fills_columns:  # a fifth of the time for a tenth of the columns
            self._add_at_positions(values, added)
            return
        drawn = self.columns[: self.selection.columns.count]
        matrix = added.view(self._inner_shape).to(values.dtype)
        # scatter_add_ and index_add_ take several times as long on a CPU
        values.index_copy_(1, drawn, values.index_select(1, drawn).add_(matrix))

    def _add_at_positions(self, values: torch.Tensor, added: torch.Tensor) -> None:
        whole = FlatView(values)
        for start, flat in _starts(self._flat_chunks()):
            part = added[start : start + flat.numel()]
            whole.write(flat, add_delta(whole.read(flat), part).to(values.dtype))

    @torch.no_grad()
    def values_now(self, dtype: torch.dtype) -> torch.Tensor:
        """A dequantised copy with the deltas, (out, in): the merged weight. It must be gathered."""
        values = self.layer.dequantized(torch.float32)
        if (added := self.added(self.at_rest)) is not None:
            self.add_to(values, added)
        return values.to(dtype)


def _starts(chunks: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each chunk with the number of scalars before it."""
    start = 0
    for chunk in chunks:
        yield start, chunk
        start += chunk.numel()
