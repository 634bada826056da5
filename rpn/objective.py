"""The training objective of arXiv 2212.05961 (section III): the clean loss plus the losses of K noisy passes."""

import contextlib
from collections.abc import Callable

from torch import Tensor

from rpn.config import RPNConfig
from rpn.hooks import Handle


def run_passes(
    handle: Handle | None,
    config: RPNConfig,
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor, bool], None],
) -> dict[str, Tensor]:
    """Accumulate the gradient of clean_weight * clean + noisy_weight * (noisy_0 + ... + noisy_{K-1}).

    Each pass runs its backward before the next pass starts, so that the memory is that of one pass. Call this function
    once per micro-batch, after handle.place(...), and step the optimizer yourself.

    Args:
        handle: the handle from rpn.attach; None: train on the clean loss only.
        config: the passes and their weights.
        forward: () -> scalar loss of the current micro-batch.
        backward: (weighted scalar loss, last) -> None. `last` is True in the last pass, after which the gradients must
            be reduced over the ranks; earlier passes need no reduction.

    Returns:
        Detached scalars: "total" is the differentiated sum. "clean" and "noisy" (the mean over the noisy passes) are
        unweighted losses, present if the objective includes them.

    Raises:
        ValueError: there is neither a clean nor a noisy pass.
    """
    noisy_passes = config.passes if handle is not None and handle.disturbs else 0
    passes: list[int | None] = [*([None] if config.clean else []), *range(noisy_passes)]
    if not passes:
        raise ValueError("clean: false, and no noise is attached: there is no loss to train on")
    clean_loss: list[Tensor] = []
    noisy_losses: list[Tensor] = []
    for pass_index in passes:
        with _mode(handle, pass_index):
            loss = forward()
            (clean_loss if pass_index is None else noisy_losses).append(loss.detach())
            weight = config.clean_weight if pass_index is None else config.noisy_weight
            backward(loss * weight, pass_index == passes[-1])
        # Otherwise this name would keep the graph of this pass alive during the next forward
        del loss
    total = config.clean_weight * sum(clean_loss) + config.noisy_weight * sum(noisy_losses)
    losses = {"total": total}
    if clean_loss:
        losses["clean"] = clean_loss[0]
    if noisy_losses:
        losses["noisy"] = sum(noisy_losses) / len(noisy_losses)
    return losses


def _mode(handle: Handle | None, pass_index: int | None) -> contextlib.AbstractContextManager:
    if handle is None:
        return contextlib.nullcontext()
    return handle.clean() if pass_index is None else handle.noisy(pass_index)
