"""The counters of a DeepSpeed engine, and the state of loss scaling, as JSON values."""

from typing import Any

from sparse_zero.checkpoint.saved_state import fitted

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def engine_counters(engine: Any) -> dict[str, int]:
    """The counters of an engine. Args: engine: None if DeepSpeed is not used; then the result is empty."""
    return {name: int(getattr(engine, name)) for name in _COUNTERS} if engine is not None else {}


def restore_engine_counters(engine: Any, saved: dict[str, int]) -> None:
    """The reverse of `engine_counters`."""
    if engine is not None:
        for name, value in saved.items():
            setattr(engine, name, value)


def loss_scale(engine: Any, scaler: Any) -> dict[str, Any] | None:
    """The state of loss scaling; None if the loss is not scaled.

    Args:
        engine: DeepSpeed's; None if DeepSpeed is not used.
        scaler: torch's GradScaler, which is used without an engine.
    """
    if engine is None:
        return scaler.state_dict() if scaler is not None else None
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler is not None else None


def fitted_loss_scale(engine: Any, scaler: Any, saved: dict[str, Any] | None, where: str) -> dict[str, Any] | None:
    """A saved state of loss scaling that fits this run; None if there is none, or if this run does not scale the loss.

    Raises UserError: it does not fit.
    """
    own = loss_scale(engine, scaler)
    return None if saved is None or not own else fitted(saved, own, where)


def restore_loss_scale(engine: Any, scaler: Any, fitting: dict[str, Any] | None) -> None:
    """The reverse of `loss_scale`. Args: fitting: see `fitted_loss_scale`."""
    if fitting is None:
        return
    if engine is None:
        scaler.load_state_dict(fitting)
    else:
        for name, value in fitting.items():
            setattr(engine.optimizer.loss_scaler, name, value)
