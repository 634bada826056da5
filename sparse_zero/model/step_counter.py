"""Counts optimizer steps, which change deltas, and forwards, which read them."""

import functools
import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparse_zero.model import writes
from sparse_zero.model.first_backward import FirstBackward

_COUNTERS: weakref.WeakSet["StepCounter"] = weakref.WeakSet()


@functools.cache
def _register_once() -> None:
    """Register the hook of all counters. It stays: the garbage collector may drop a counter while torch iterates over
    its hooks, which must not change then."""

    def count(optimizer: Optimizer, *_: Any) -> None:
        for counter in list(_COUNTERS):
            counter.after_step(optimizer)

    register_optimizer_step_post_hook(count)


class StepCounter:
    """Counts optimizer steps and forwards of a model. Deltas are written once per step, not once per forward.

    After the step of an optimizer that has a delta, the delta is written at once. DeepSpeed updates parameters through
    flat buffers, after its optimizer's step and without a change of version counters. But its optimizers call torch's
    optimizer hooks too: from the number of steps the next forward knows that it must write.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Steps of any optimizer in this process."""
        self.forwards = 0
        """Forwards of the model."""
        self.training_forwards = 0
        """Forwards in training mode. Dropout draws a new mask for each."""
        self.training = False
        """Whether the last forward was one in training mode."""
        self.watch: FirstBackward | None = None
        """Watches the model's first backward, until the optimizer step after it."""
        self.weights: weakref.WeakSet[writes.Writable] = weakref.WeakSet()
        """The weights of the model and of its copies, those of inactive adapters included."""
        _register_once()
        _COUNTERS.add(self)

    def add(self, weight: writes.Writable) -> None:
        """Write the deltas of this weight after the steps of an optimizer that has them."""
        self.weights.add(weight)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count a step, and write the deltas that the optimizer has changed."""
        self.steps += 1
        if self.watch and self.watch.after_step(optimizer):
            self.watch = None
        changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        writes.refresh(weight for weight in list(self.weights) if weight.is_attached and id(weight.delta) in changed)

    def before_forward(self, model: nn.Module, _: Any) -> None:
        """A forward pre-hook of the whole model: a layer may run several times in one forward."""
        self.training = model.training
        self.forwards += 1
        self.training_forwards += model.training

    def __deepcopy__(self, memo: dict) -> "StepCounter":
        return self  # steps are counted for all optimizers of the process, so a copy of the model can share it

    def __copy__(self) -> "StepCounter":
        return self

    def __reduce__(self) -> tuple:
        return StepCounter, ()  # a pickled model needs an optimizer hook in the process that opens it
