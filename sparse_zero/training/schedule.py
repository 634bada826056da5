"""The place of a resumed run in the schedule of the learning rate."""

from typing import Any


def restored_rates(scheduler: Any, saved: dict[str, Any] | None, rates: list[float]) -> list[float]:
    """Load the state of a checkpoint's scheduler, and compute the rates of the next step.

    They are the checkpoint's, unless the schedule has changed: it may have more steps now.

    Args:
        scheduler: of torch or DeepSpeed, or Accelerate's wrapper of one; None: there is none.
        saved: its state in the checkpoint; None: the run that saved had none.
        rates: those of the checkpoint, one for each group of the optimizer.

    Returns: one for each group.
    """
    if scheduler is None or saved is None:
        return rates
    scheduler.load_state_dict(saved)
    inner = _inner(scheduler)
    return _rates(inner) if hasattr(inner, "lr_lambdas") else rates


def rates_at(scheduler: Any, saved: dict[str, Any] | None, step: int, initial: list[float]) -> list[float]:
    """Set a new scheduler to a step, and compute the rates of the next one.

    A scheduler whose rates do not follow from the step alone, such as ReduceLROnPlateau, stays at its beginning.

    Args:
        scheduler, saved: see `restored_rates`. The state may be of another kind of scheduler.
        step: of the checkpoint.
        initial: the rates without a schedule, one for each group of the optimizer.

    Returns: one for each group.
    """
    inner, saved = _inner(scheduler), saved or {}
    if "last_batch_iteration" in saved and hasattr(inner, "last_batch_iteration"):
        inner.load_state_dict(saved)  # DeepSpeed's: nothing but the position
        return inner.get_lr()
    if not hasattr(inner, "lr_lambdas"):
        return initial
    # The count of the same kind is right also if it does not advance by one in each step.
    inner.last_epoch = saved["last_epoch"] if "base_lrs" in saved else step
    inner._step_count = inner.last_epoch + 1
    return _rates(inner)


def _inner(scheduler: Any) -> Any:
    return getattr(scheduler, "scheduler", scheduler)


def _rates(scheduler: Any) -> list[float]:
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in rates]
    return list(scheduler._last_lr)
