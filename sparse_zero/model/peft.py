"""Methods of PEFT beside sparse deltas: refused. They are known by the names of their classes: PEFT is not imported.

PEFT freezes everything that is not its own when it adds an adapter or trained prompts, and saves nothing else.
"""

import functools
import gc
import logging
import sys
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_zero.errors import UserError
from sparse_zero.model.sparsity import state_of

logger = logging.getLogger(__name__)

_OURS = "SparseZeroModel"
"""The tuner of `sparse_zero.peft`."""

_TUNERS = {"BaseTuner", "AdaptionPromptModel"}
"""PEFT puts one of these between a PeftModel and the base model; only a PeftModel with trained prompts has none."""

_HOLDERS = _TUNERS | {"PeftModel", "PeftMixedModel"}


@functools.cache
def watch() -> None:
    """From now on refuse that PEFT takes a sparse model, before it has changed anything."""
    register_module_module_registration_hook(_refuse)


def _refuse(holder: nn.Module, name: str, model: nn.Module | None) -> None:
    """A hook of torch for each module that another one gets. Raises UserError."""
    kinds = _kinds(holder)
    if not kinds & _HOLDERS or _OURS in kinds or model is None or _kinds(model) & _TUNERS:
        return
    if not any(state_of(module) is not None for module in model.modules()):
        return
    if "peft_config" not in vars(model):
        vars(model).pop("_hf_peft_config_loaded", None)  # set by add_adapter of transformers
    raise UserError(
        f"{_method(holder)} of PEFT on a sparse model would freeze its deltas, and not save them: call "
        "merge_and_unload(model) or unload(model) before get_peft_model or add_adapter"
    )


def warn_of_prompts(model: nn.Module) -> None:
    """Warn if the base model of a PeftModel with trained prompts becomes sparse.

    All that it leaves in its base model is that nothing requires a gradient. The search takes a few tenths
    of a second.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return
    for found in gc.get_objects():
        if issubclass(type(found), peft.PeftModel) and found._modules.get("base_model") is model:
            logger.warning(
                "the model is the base model of a PeftModel with %s, whose save_pretrained leaves out the deltas: "
                "save them with save_adapter(model, directory)",
                _method(found),
            )
            return


def _method(holder: nn.Module) -> str:
    kind: Any = vars(holder).get("peft_type")
    return getattr(kind, "value", type(holder).__name__)


def _kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}
