"""The reference policy of DPO, GRPO and RLOO: the policy's own weights without what was trained."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sparse_zero.model.reference import keep_reference, reference_values


class ReferencePolicy:
    """What TRL calls in place of a second model.

    It computes in evaluation mode, as TRL's own reference models do. Under ZeRO stage 3, all ranks must call it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args: model: the sparse policy, whose present values become the reference."""
        self._model = model
        self.is_as_loaded = keep_reference(model)
        """Whether the reference is the adapter as it was loaded, and not the base model."""

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        was_training = self._model.training
        self._model.eval()
        try:
            with reference_values(self._model):
                return self._model(**inputs)
        finally:
            self._model.train(was_training)


@contextlib.contextmanager
def without_second_base(module: ModuleType) -> Iterator[None]:
    """A context in which a trainer of TRL is created without a reference model. TRL has no argument for it: without
    `ref_model` it loads the base model a second time, unless the policy is PEFT's.

    Args: module: TRL's module with the trainer.
    """
    load = module.create_model_from_path
    module.create_model_from_path = lambda *_, **__: None
    try:
        yield
    finally:
        module.create_model_from_path = load
