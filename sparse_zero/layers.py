"""The parametrisation: a module whose frozen weight carries a trainable 1-D delta at the selected positions.

A sparse module computes exactly what it did before, with W[selected] = w0 + delta inside its own weight, and passes
its output through a node whose backward yields the gradient of delta. The weight keeps its name and its place in the
state dict; beside `weight` stand
    weight_delta         Parameter (n,)    trained
    weight_base          buffer (n,)       w0, the original values, so that unmerging is exact
    weight_row_starts    buffer (R + 1,)   CSR pattern of the positions, int32
    weight_column_index  buffer (n,)
"""

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from sparse_zero.sampled_gradient import csr_pattern, flat_positions, sampled_product
from sparse_zero.zero import full_shape, gathered, is_partitioned


class UpdateClock:
    """Counts optimizer steps, so that deltas are written into their weights once per step, not once per forward.

    DeepSpeed updates parameters through flat buffers, which a tensor's version counter does not see; but every
    optimizer, DeepSpeed's too, runs torch's optimizer hooks.
    """

    def __init__(self) -> None:
        self.steps = 0
        reference = weakref.ref(self)

        def tick(*_: Any) -> None:
            if clock := reference():
                clock.steps += 1

        weakref.finalize(self, register_optimizer_step_post_hook(tick).remove)

    def __deepcopy__(self, memo: dict) -> "UpdateClock":
        return self  # a copied model is trained by optimizers too

    def __reduce__(self) -> tuple:
        return UpdateClock, ()  # a pickled model needs a hook in the process that opens it


class SparseWeight:
    """One selected weight: where its tensors are, and how they go into the module's own weight."""

    def __init__(self, module: nn.Module, parameter: str, selected: torch.Tensor, clock: UpdateClock) -> None:
        """Args: selected: int64 (n,), sorted positions in the flattened weight. Collective under ZeRO stage 3."""
        self.module, self.parameter, self.clock = module, parameter, clock
        self.plain_class = type(module)
        self.enabled = True
        weight = self.weight
        self.shape = full_shape(weight)
        assert len(self.shape) == 2, (parameter, self.shape)
        assert selected.numel() > 0, f"{parameter}: a delta of length 0 breaks ZeRO stage 3"
        row_starts, column_index = csr_pattern(selected.to(weight.device), *self.shape)
        with gathered([weight]):
            base = weight.detach().view(-1)[selected.to(weight.device)].clone()
        # Under ZeRO the delta follows the weight's dtype, and the float32 original lives in the optimizer's partition.
        dtype = weight.dtype if is_partitioned(weight) else torch.float32
        delta = nn.Parameter(torch.zeros(selected.numel(), dtype=dtype, device=weight.device))
        module.register_parameter(f"{parameter}_delta", delta)
        for name, value in (("base", base), ("row_starts", row_starts), ("column_index", column_index)):
            module.register_buffer(f"{parameter}_{name}", value, persistent=False)
        self._written: tuple | None = None

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)

    @property
    def delta(self) -> nn.Parameter:
        return getattr(self.module, f"{self.parameter}_delta")

    @property
    def base(self) -> torch.Tensor:
        return getattr(self.module, f"{self.parameter}_base")

    @property
    def pattern(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(row_starts, column_index) of the selected positions."""
        return (
            getattr(self.module, f"{self.parameter}_row_starts"),
            getattr(self.module, f"{self.parameter}_column_index"),
        )

    def flat_positions(self) -> torch.Tensor:
        """Returns: int64 (n,), the selected positions in the flattened weight."""
        return flat_positions(*self.pattern, self.shape[1])

    @torch.no_grad()
    def write(self) -> None:
        """W[selected] = w0 + delta, or w0 while disabled. The weight must be whole."""
        values = self.base
        if self.enabled:
            values = values.to(torch.promote_types(values.dtype, torch.float32)) + self.delta
        weight = self.weight
        # A stage-3 copy is written again in each gather, always with the values that the graph already saw, so
        # autograd must not count it as a change. Elsewhere the count protects graphs from before an optimizer step.
        target = weight.data if is_partitioned(weight) else weight.detach()
        target.view(-1)[self.flat_positions()] = values.to(weight.dtype)

    def refresh(self) -> None:
        """Write, unless the weight already holds these values. Called in every forward."""
        if is_partitioned(self.weight) or self._written != self._state():
            self.write()
            self._written = self._state()

    def _state(self) -> tuple:
        """Changes whenever the weight might not hold w0 + delta: a step, a load, an assignment, a disabled adapter."""
        weight, delta = self.weight, self.delta
        return self.clock.steps, self.enabled, id(delta), delta._version, id(weight), weight._version

    def invalidate(self) -> None:
        """Make the next forward write again: the delta was changed behind autograd's back (`delta.data`)."""
        self._written = None

    def remove(self) -> None:
        """Take the delta and its buffers off the module; the weight stays as it is."""
        for name in ("delta", "base", "row_starts", "column_index"):
            delattr(self.module, f"{self.parameter}_{name}")


class _SampledGradient(torch.autograd.Function):
    """The identity on a module's output; its backward adds the gradient of the delta."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, inputs: torch.Tensor, delta: torch.Tensor, module: "SparseModule"
    ) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(inputs)
        # Not a view: autograd forbids in-place operations (a ReLU) on views that a Function made. None of the wrapped
        # modules needs its own output in backward, so sharing the memory is safe.
        return output.data

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        (inputs,) = ctx.saved_tensors
        # This node runs before the module's own backward, which reads the weight. A stage-3 copy is gathered afresh,
        # without the deltas; any other weight still holds what the forward saw, or autograd refuses it.
        if is_partitioned(ctx.module.sparse_weight.weight):
            ctx.module.sparse_weight.write()
        return grad_output, None, ctx.module.delta_gradient(inputs, grad_output), None


class SparseModule:
    """Mixed into the class of a targeted module. Subclasses say which operand gives the rows of the weight."""

    sparse_weight: SparseWeight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.sparse_weight.refresh()
        output = super().forward(inputs)
        delta = self.sparse_weight.delta
        if not (torch.is_grad_enabled() and delta.requires_grad):
            return output
        return _SampledGradient.apply(output, inputs, delta, self)

    def delta_gradient(self, inputs: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        """Args: inputs (..., in), grad_output (..., out). Returns: (n,) in the delta's dtype."""
        flat_inputs, flat_grad = inputs.reshape(-1, inputs.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        rows, columns = self.operands(flat_inputs, flat_grad)
        gradient = sampled_product(rows, columns, *self.sparse_weight.pattern)
        return gradient.to(self.sparse_weight.delta.dtype)


class SparseLinear(SparseModule, nn.Linear):
    """weight (out, in)"""

    @staticmethod
    def operands(inputs: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_output, inputs


class SparseConv1D(SparseModule, Conv1D):
    """GPT-2's linear layer: weight (in, out)"""

    @staticmethod
    def operands(inputs: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs, grad_output


@functools.cache
def sparse_class(plain: type[nn.Module]) -> type[SparseModule] | None:
    """What a module of class `plain` becomes; None where the gradient of its weight is not known here."""
    if plain in (nn.Linear, Conv1D):
        return SparseLinear if plain is nn.Linear else SparseConv1D
    # nn.Linear but for its rounding: x @ W.T + b. By name, for to import it takes seconds.
    if (plain.__module__, plain.__name__) == ("transformers.models.falcon.modeling_falcon", "FalconLinear"):
        return type("SparseFalconLinear", (SparseLinear, plain), {})
    return None


def is_supported(module: nn.Module) -> bool:
    """Whether the module's forward is one whose weight gradient is known here."""
    return sparse_class(type(module)) is not None


def attach(module: nn.Module, selected: torch.Tensor, clock: UpdateClock) -> SparseWeight:
    """Turn a linear layer into a sparse one, in place."""
    weight = SparseWeight(module, "weight", selected, clock)
    module.__class__ = sparse_class(weight.plain_class)
    module.sparse_weight = weight
    return weight


def detach(module: nn.Module) -> None:
    """Turn a sparse module back into what it was; its weight keeps the values it holds now."""
    weight = module.sparse_weight
    weight.remove()
    del module.sparse_weight
    module.__class__ = weight.plain_class
