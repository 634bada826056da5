"""Counts optimizer steps, which change deltas, and forwards, which read them."""

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_zero.model.first_backward import FirstBackward


class StepCounter:
    """Counts optimizer steps and forwards of a model. Deltas are then written once per step, not once per forward.

    DeepSpeed updates parameters through flat buffers, without a change of their version counters. But every optimizer,
    including DeepSpeed's, calls torch's optimizer hooks.
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
        reference = weakref.ref(self)

        def count(optimizer: Any, *_: Any) -> None:
            if counter := reference():
                counter.steps += 1
                if counter.watch and counter.watch.after_step(optimizer):
                    counter.watch = None

        weakref.finalize(self, register_optimizer_step_post_hook(count).remove)

    def before_forward(self, model: nn.Module, _: Any) -> None:
        """A forward pre-hook of the whole model: a layer may run several times in one forward."""
        self.training = model.training
        self.forwards += 1
        self.training_forwards += model.training

    def __deepcopy__(self, memo: dict) -> "StepCounter":
        return self  # steps are counted for all optimizers of the process, so a copy of the model can share it

    def __reduce__(self) -> tuple:
        return StepCounter, ()  # a pickled model needs an optimizer hook in the process that opens it
