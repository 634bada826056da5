"""The settings of the loss, `chunked_loss` and `use_liger_kernel`, and what they do not go together with."""

import importlib
import logging
import os
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from sparse_zero.errors import UserError
from sparse_zero.training.chunked_loss import ChunkedLoss, refuse_float16, require_operator

logger = logging.getLogger(__name__)

_INSTEAD = "or set training.chunked_loss instead, which needs no other package"


def chunked_loss(model: nn.Module, arguments: TrainingArguments, own_loss: Any) -> ChunkedLoss | None:
    """Check the settings of the loss.

    Args:
        model: the model that is trained.
        arguments: of the Trainer.
        own_loss: the Trainer's `compute_loss_func`.

    Returns: the loss of a run with `chunked_loss`, else None.

    Raises UserError: Liger is not installed or has no device, or `chunked_loss` does not fit the model or another
        setting.
    """
    check_loss_settings(arguments)
    if arguments.use_liger_kernel:
        _check_liger(model, arguments)
    if not getattr(arguments, "chunked_loss", False):
        return None
    if own_loss is not None:
        raise UserError("training.chunked_loss: compute_loss_func needs the logits; set chunked_loss to false")
    return ChunkedLoss(model)


def check_loss_settings(arguments: TrainingArguments) -> None:
    """Check what needs neither the model nor its device. Raises UserError: see `chunked_loss`."""
    chunked = getattr(arguments, "chunked_loss", False)
    if chunked and arguments.use_liger_kernel:
        raise UserError(
            "training.chunked_loss: training.use_liger_kernel computes the loss in chunks too; set one of them"
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            f"training.use_liger_kernel: the package liger-kernel is missing; pip install liger-kernel, {_INSTEAD}"
        )
    if not chunked:
        return
    require_operator()
    if arguments.label_smoothing_factor:
        raise UserError(
            "training.chunked_loss: training.label_smoothing_factor needs the logits; set one of them to its default"
        )
    if arguments.fp16:
        refuse_float16()
    if arguments.parallelism_config is not None:
        raise UserError("training.chunked_loss: not together with training.parallelism_config; set one of them only")


def _check_liger(model: nn.Module, arguments: TrainingArguments) -> None:
    if arguments.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"training.use_liger_kernel: Liger's kernels need a GPU; use one, {_INSTEAD}")
    known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.config.model_type
    if kind not in known:
        logger.warning(
            "training.use_liger_kernel: Liger has no kernels for models of type '%s'; nothing changes", kind
        )
