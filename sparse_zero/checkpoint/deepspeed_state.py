"""The counters of a DeepSpeed engine, and the state of loss scaling, as JSON values."""

from typing import Any

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


def restore_loss_scale(engine: Any, scaler: Any, saved: dict[str, Any] | None) -> None:
    """The reverse of `loss_scale`."""
    if saved is None:
        return
    if engine is None:
        if scaler is not None:
            scaler.load_state_dict(saved)
    elif (scaler := getattr(engine.optimizer, "loss_scaler", None)) is not None:
        for name in vars(scaler).keys() & saved.keys():
            setattr(scaler, name, saved[name])
