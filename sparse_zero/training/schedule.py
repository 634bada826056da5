"""The place of a resumed run in a schedule of the learning rate that is not the checkpoint's own."""

from typing import Any


def rates_at(scheduler: Any, saved: dict[str, Any] | None, step: int, initial: list[float]) -> list[float]:
    """Set a new scheduler to a step, and compute the learning rates there.

    A scheduler whose rates do not follow from the step alone, such as ReduceLROnPlateau, stays at its beginning.

    Args:
        scheduler: of torch or DeepSpeed, or Accelerate's wrapper of one; None: there is none.
        saved: the state of the scheduler in the checkpoint, which may be of another kind.
        step: of the checkpoint.
        initial: the rates of the optimizer's groups without a schedule.

    Returns: one for each group.
    """
    inner, saved = getattr(scheduler, "scheduler", scheduler), saved or {}
    if "last_batch_iteration" in saved and hasattr(inner, "last_batch_iteration"):
        inner.load_state_dict(saved)  # DeepSpeed's: nothing but the position
        return inner.get_lr()
    if not hasattr(inner, "lr_lambdas"):
        return initial
    # The count of the same kind is right also if it does not advance by one in each step.
    inner.last_epoch = saved["last_epoch"] if "base_lrs" in saved else step
    inner._step_count = inner.last_epoch + 1
    rates = zip(inner.base_lrs, inner.lr_lambdas, strict=True)
    inner._last_lr = [base * factor(inner.last_epoch) for base, factor in rates]
    return list(inner._last_lr)
