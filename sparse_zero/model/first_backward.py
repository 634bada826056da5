"""Warns of trained parameters that got no gradient before the first optimizer step: they would never change.

A hook on each parameter notes that a gradient arrived; `.grad` is not enough, because DeepSpeed takes gradients out.
After the first step the hooks are removed.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


class FirstBackward:
    """Watches the trained parameters of a model until the first optimizer step after a backward."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Args: parameters: the trained parameters by name; a delta has the name of its weight."""
        # Weak, because the hooks of the parameters refer to this object
        self._parameters = {name: weakref.ref(parameter) for name, parameter in parameters.items()}
        self._reached: set[str] = set()
        self._hooks = [parameter.register_hook(self._noting(name)) for name, parameter in parameters.items()]

    def _noting(self, name: str) -> Any:
        return lambda _: self._reached.add(name)

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Warn if this was the first step after a backward of the model. Returns: whether the watch is over."""
        parameters = {
            name: parameter for name, found in self._parameters.items() if (parameter := found()) is not None
        }
        if not parameters:
            return True
        # A gradient may also be assigned. Other optimizers in the process may train other models.
        with_gradient = {name for name, parameter in parameters.items() if parameter.grad is not None} | self._reached
        if not with_gradient and not self._has_stepped_others(optimizer, parameters):
            return False
        missing = [name for name in parameters if name not in with_gradient and parameters[name].requires_grad]
        self.remove()
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            logger.warning(
                "%s%s got no gradient before the first optimizer step, so their values stay as they are. Either their "
                "layers did not run, or they ran where autograd does not record: in torch.utils.checkpoint with "
                "use_reentrant=True (call model.enable_input_require_grads(), or set use_reentrant=False), in layers "
                "that recompute in a backward of their own, or under torch.no_grad()",
                missing[0],
                more,
            )
        return True

    @staticmethod
    def _has_stepped_others(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether the optimizer has parameters of the model, and a gradient for another parameter only."""
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ours = {id(parameter) for parameter in parameters.values()}
        return any(id(p) in ours for p in stepped) and any(p.grad is not None for p in stepped)

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._parameters.clear()

    def __deepcopy__(self, memo: dict) -> "FirstBackward":
        return FirstBackward({})  # copies of parameters have no hooks

    def __reduce__(self) -> tuple:
        return FirstBackward, ({},)
